"""The neighbours: TorchRL environments and loss modules."""
