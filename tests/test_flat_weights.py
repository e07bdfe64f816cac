"""An optimiser step over joined weights is the step over each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unified_rl.flat_weights import MOST, FlatWeights
from unified_rl.optimizer import Optimizer


def modules(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"policy": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), "critic": nn.Linear(3, 1)}


def loss_of(nets: dict[str, nn.Module], x: Tensor) -> Tensor:
    return nets["policy"](x).square().mean() + (nets["critic"](x) - 1.0).square().mean()


def trained(joined: bool, steps: int = 6, **options: Any) -> tuple[Optimizer, dict[str, nn.Module], list[Tensor]]:
    """Steps on a fixed stream of inputs; without joining, each weight is stepped by itself."""
    nets, stream = modules(), torch.Generator().manual_seed(1)
    optimizer, norms = Optimizer(nets, 0.05, **options), []
    optimizer._joins = joined
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(nets, torch.randn(8, 3, generator=stream))
        loss.backward()
        norms.append(optimizer.step(loss))
    return optimizer, nets, norms


OPTIONS: list[dict[str, Any]] = [
    {"kind": "adam"},
    {"kind": "adamw", "max_grad_norm": 0.1},
    {"kind": "adamw", "weight_decay": 0.1, "max_grad_norm": 0.5},
    {"kind": "adamw", "rates": {"critic": 0.01}},
    {"kind": {"name": "adam", "amsgrad": True}},
    {"kind": {"name": "adamw", "betas": [0.5, 0.9], "eps": 1e-3}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_joined_weights_take_the_same_steps(options: dict[str, Any]) -> None:
    (one, mine, norms), (other, theirs, expected) = trained(True, **options), trained(False, **options)
    assert one._flat is not None and other._flat is None
    torch.testing.assert_close(norms, expected)
    for name, net in mine.items():
        torch.testing.assert_close(dict(net.named_parameters()), dict(theirs[name].named_parameters()))
    saved, expected_state = one.state_dict()["adam"], other.state_dict()["adam"]
    torch.testing.assert_close(saved["state"], expected_state["state"])
    assert saved["param_groups"] == expected_state["param_groups"]


def test_what_is_saved_does_not_tell_whether_weights_were_joined_and_goes_on_as_it_would() -> None:
    whole, nets, _ = trained(True, 9)
    half, again, _ = trained(True, 6)
    kept, weights = half.state_dict(), {name: net.state_dict() for name, net in again.items()}
    assert {len(kept["adam"]["state"]), len(kept["adam"]["param_groups"][0]["params"])} == {6}
    fresh = modules(5)
    optimizer = Optimizer(fresh, 0.05)
    for name, net in fresh.items():
        net.load_state_dict(weights[name])
    optimizer.load_state_dict(kept)
    stream = torch.Generator().manual_seed(1)
    for step in range(9):
        x = torch.randn(8, 3, generator=stream)
        if step >= 6:
            optimizer.zero_grad()
            loss = loss_of(fresh, x)
            loss.backward()
            optimizer.step(loss)
    for name, net in nets.items():
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh[name].parameters(), strict=True))
    assert whole._flat is not None and optimizer._flat is not None


def test_a_module_without_gradient_stays_and_one_with_some_is_taken_apart() -> None:
    nets = modules()
    optimizer = Optimizer(nets, 0.05)
    before = [weight.detach().clone() for weight in nets["policy"].parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss = nets["critic"](torch.ones(2, 3)).square().mean()
        loss.backward()
        optimizer.step(loss)
    assert optimizer._flat is not None
    assert all(torch.equal(a, b) for a, b in zip(before, nets["policy"].parameters(), strict=True))
    optimizer.zero_grad()
    loss = nets["policy"][2](torch.ones(2, 4)).sum()  # type: ignore[index]
    loss.backward()
    optimizer.step(loss)
    now = list(nets["policy"].parameters())
    assert optimizer._flat is None and torch.equal(before[0], now[0]) and not torch.equal(before[2], now[2])
    assert {float(state["step"]) for state in optimizer.adam.state.values()} == {1.0, 2.0}


def test_weights_that_move_elsewhere_are_still_trained() -> None:
    optimizer, nets, _ = trained(True)
    weight = nets["critic"].weight
    weight.data = weight.data.clone()  # as Module.to does
    before = weight.detach().clone()
    optimizer.zero_grad()
    loss = loss_of(nets, torch.ones(2, 3))
    loss.backward()
    optimizer.step(loss)
    assert optimizer._flat is None and not torch.equal(before, weight)


def test_who_listens_to_the_optimiser_is_heard() -> None:
    optimizer, nets, _ = trained(True)
    heard: list[int] = []
    optimizer.adam.register_step_post_hook(lambda *_: heard.append(1))
    optimizer.zero_grad()
    loss = loss_of(nets, torch.ones(2, 3))
    loss.backward()
    optimizer.step(loss)
    assert optimizer._flat is not None and heard == [1]


def test_only_few_numbers_that_an_optimiser_treats_alike_are_joined() -> None:
    def possible(kind: str, nets: dict[str, nn.Module]) -> bool:
        return FlatWeights.possible(Optimizer(nets, 0.1, kind=kind).adam)

    assert possible("adam", modules()) and not possible("sgd", modules()) and not possible("adafactor", modules())
    assert not possible("adam", {"policy": nn.Linear(MOST // 4, 4)})
    assert not possible("adam", {name: net.double() for name, net in modules().items()})
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight.data = tied[0].weight.data  # type: ignore[union-attr]
    assert not possible("adam", {"policy": tied})


def test_moments_are_mixed_alike_where_weights_are_taken_apart_in_between() -> None:
    found = []
    for joined, apart in ((True, False), (True, True), (False, False)):
        optimizer, nets, _ = trained(joined, 3)
        before = optimizer.moments()
        optimizer.zero_grad()
        loss = loss_of(nets, torch.ones(4, 3))
        loss.backward()
        optimizer.step(loss)
        if apart:
            optimizer._part()
        optimizer.mix_moments(before, 0.25)
        found.append(optimizer.state_dict()["adam"]["state"])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)
    assert float(found[0][0]["step"]) == 3.25


def test_every_joined_weight_lies_as_if_it_were_by_itself() -> None:
    _, nets, _ = trained(True)
    places = [weight.data_ptr() for net in nets.values() for weight in net.parameters()]
    assert all(place % 64 == 0 for place in places) and max(places) - min(places) < 4096
