"""Every tensor of each golden checkpoint, in PyTorch's names (see README.md)."""

import json
from pathlib import Path

_FOLDER = Path(__file__).parent / "inventory"
# Checkpoints with the tensors of another, under the other's name.
ALIASES = {
    "nano_causal": "classification_nano",
    "nano_negative_da": "classification_nano",
    "nano_bidirectional": "nano_groups",
}
INVENTORIES = (*sorted(path.stem for path in _FOLDER.glob("*.json")), *ALIASES)


def load_inventory(name: str) -> dict[str, tuple[list[int], str]]:
    """The shape and dtype of each tensor by name, in the order of the checkpoint."""
    tensors = json.loads((_FOLDER / f"{ALIASES.get(name, name)}.json").read_text())
    return {tensor: (shape, dtype) for tensor, (shape, dtype) in tensors.items()}
