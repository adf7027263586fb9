"""Find the graphs of an exported folder. Nothing is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SUBFOLDERS = ("onnx", ".")
_ENCODER = ("encoder.onnx", "encoder_model.onnx")
_PREFILL = ("model.onnx", "prefill.onnx", "decoder_model.onnx", "decoder_model_merged.onnx")
_DECODE = ("decode.onnx", "decoder_with_past_model.onnx", "model_with_past.onnx")
_MARKS = ("export.json", "genai_config.json", "config.json")
"""One of these beside a graph says that the folder is an export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFolder:
    """The graphs of one model."""

    root: Path
    """Folder that they lie in."""
    prefill: Path
    """Reads a whole text, or any other input."""
    decode: Path
    """Continues a text over a cache; the same file where one graph does both."""
    encoder: Path | None = None
    """Reads the input, where the decoder is another part of the model."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every graph, once, in the order in which they run."""
        first = () if self.encoder is None else (self.encoder,)
        return tuple(dict.fromkeys((*first, self.prefill, self.decode)))

    @property
    def n_bytes(self) -> int:
        """Size of graphs and of the weights that lie beside them."""
        return sum(path.stat().st_size for path in self.root.glob("*.onnx*") if path.is_file())


def find_graphs(folder: Path) -> GraphFolder | None:
    """Find the graphs in ``folder/onnx`` or in the folder itself; a graph file stands for its own folder."""
    if folder.suffix == ".onnx" and folder.is_file():
        return GraphFolder(root=folder.parent, prefill=folder, decode=folder)
    for name in _SUBFOLDERS:
        root = folder / name if name != "." else folder
        prefill = next((root / file for file in _PREFILL if (root / file).is_file()), None)
        if prefill is None or not any((place / mark).is_file() for mark in _MARKS for place in (root, folder)):
            continue
        decode = next((root / file for file in _DECODE if (root / file).is_file()), prefill)
        encoder = next((root / file for file in _ENCODER if (root / file).is_file()), None)
        return GraphFolder(root=root, prefill=prefill, decode=decode, encoder=encoder)
    return None


def find_pipeline_graphs(folder: Path) -> tuple[Path, dict[str, GraphFolder]] | None:
    """Find a pipeline's graphs, each in a folder of its own, in ``folder/onnx`` or in the folder itself.

    Gives the folder that they are in, and each by its name.
    """
    for name in _SUBFOLDERS:
        root = folder / name if name != "." else folder
        if not (root / _MARKS[0]).is_file():
            continue
        found = {
            path.parent.name: GraphFolder(root=path.parent, prefill=path, decode=path)
            for path in sorted(root.glob(f"*/{_PREFILL[0]}"))
        }
        if found:
            return root, found
    return None
