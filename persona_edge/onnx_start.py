"""Which ONNX model a chat argument stands for: a folder or graph itself, or the one exported beside a GGUF file."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Literal

from persona_edge.catalogue import load_catalogue, resolve_model
from persona_edge.errors import InputError
from persona_edge.exporters.to_onnx import onnx_folder
from persona_edge.onnx_model import find_onnx

__all__ = ["Backend", "onnx_model_for"]

Backend = Literal["auto", "gguf", "onnx"]


def onnx_model_for(argument: str, backend: Backend = "auto") -> Path | None:
    """The ONNX graph to open for `--model argument`; None when it is a GGUF file that is to be opened.

    With "onnx" a catalogue name or a GGUF file stands for the folder that `export --format onnx` writes beside it.
    Raises InputError when the backend does not go with the model, and what `resolve_model` raises.
    """
    found = _itself(argument)
    if backend == "gguf" and found is not None:
        raise InputError(f"{argument} is an ONNX model, --backend gguf needs a GGUF file; leave the option out")
    if backend != "onnx" or found is not None:
        return found
    gguf = resolve_model(argument).require_gguf()
    beside = find_onnx(onnx_folder(gguf))
    if beside is None:
        raise InputError(
            f"no ONNX model beside {gguf.name}; make one with: persona-edge export --model {shlex.quote(argument)} "
            "--personas mbti16 --format onnx"
        )
    return beside


def _itself(argument: str) -> Path | None:
    """`argument` as a path; a bare name that the catalogue knows is no path."""
    is_name = os.sep not in argument and "/" not in argument and argument.casefold() in load_catalogue()
    return None if is_name or not argument else find_onnx(Path(argument).expanduser())
