"""Fixtures that several test modules share: the real models and the public evaluation data.

Models come through the catalogue, as a user's would: from the cache when they are there, otherwise fetched once. A test
that needs what this machine cannot get is skipped with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from persona_edge.catalogue import resolve_model
from persona_edge.errors import PersonaEdgeError

if TYPE_CHECKING:
    from persona_edge.masks import PersonaSet
    from persona_edge.modeling import TorchModel
    from persona_edge.runtime.session import PersonaRuntime
    from tests.workplace import Exported, Workplace


def _model(name: str) -> Path:
    try:
        return resolve_model(name).require_gguf()
    except PersonaEdgeError as error:
        pytest.skip(f"{name} cannot be had: {error}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1 and Q8_0, 98 MB."""
    return _model("smollm2-135m")


@pytest.fixture(scope="session")
def qwen_path() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q5_0, Q8_0, Q6_K and Q4_K, 491 MB."""
    return _model("qwen2.5-0.5b")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M (base), Q5_0, Q4_K, Q8_0 and Q6_K, 253 MB."""
    return _model("gemma3-270m")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The public evaluation data, which is not part of this repository."""
    named = os.environ.get("PERSONA_EDGE_DATA")
    if not named:
        pytest.skip("PERSONA_EDGE_DATA is not set to the folder of the evaluation data")
    folder = Path(named).expanduser()
    if not folder.is_dir():
        pytest.skip(f"PERSONA_EDGE_DATA={named} is not a folder")
    return folder


@pytest.fixture(scope="session")
def smollm2_torch(smollm2_path: Path) -> TorchModel:
    """SmolLM2 in PyTorch, float32 on the CPU. Loading takes many seconds, so all tests share it: leave it as it was."""
    from persona_edge.modeling import load_torch_model

    return load_torch_model(smollm2_path, name="smollm2", device="cpu", dtype="float32")


# A session on the real 135M model, opened once for all tests of it (test_session_*.py)


@pytest.fixture(scope="session")
def smollm2_personas(smollm2_path: Path) -> PersonaSet:
    """Aye, Bee and Both, random masks."""
    from tests.real_chat import random_personas

    return random_personas(smollm2_path)


@pytest.fixture(scope="session")
def smollm2_pack(smollm2_personas: PersonaSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    from persona_edge.maskpack import write_pack

    path = tmp_path_factory.mktemp("packs") / "test.maskpack"
    write_pack(path, smollm2_personas)
    return path


@pytest.fixture(scope="session")
def smollm2_session(smollm2_path: Path, smollm2_pack: Path) -> Iterator[PersonaRuntime]:
    """The session as the last test left it: ask for `runtime`."""
    from persona_edge.runtime.session import PersonaRuntime

    with PersonaRuntime.open(smollm2_path, smollm2_pack, n_ctx=256, n_threads=1) as runtime:
        yield runtime


@pytest.fixture
def runtime(smollm2_session: PersonaRuntime) -> PersonaRuntime:
    """The session at base, with an empty cache."""
    smollm2_session.base()
    smollm2_session._backend.clear()
    return smollm2_session


@pytest.fixture(scope="session")
def cold_text(smollm2_path: Path) -> str:
    """What a fresh model makes of STORY."""
    from persona_edge.runtime.session import PersonaRuntime
    from tests.real_chat import GREEDY, STORY

    with PersonaRuntime.open(smollm2_path, n_ctx=256, n_threads=1) as fresh:
        return fresh.generate(STORY, GREEDY).text


# A chat model of noise that takes a millisecond (tiny_chat.py)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.gguf and its pack tiny.mbti.maskpack, to be read only."""
    from tests.tiny_chat import write_model_and_pack

    return write_model_and_pack(tmp_path_factory.mktemp("models")).parent


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> str:
    """The path of its model."""
    return str(tiny_folder / "tiny.gguf")


# A folder with the real 135M model and a pack that the real program made there (test_end_to_end*.py)


@pytest.fixture(scope="session")
def place(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The folder as it is at first; any test may have exported the pack since."""
    from tests.workplace import Workplace

    place = Workplace.around("smollm2", tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("cache"))
    place.model.symlink_to(smollm2_path)
    return place


@pytest.fixture(scope="session")
def exported(place: Workplace) -> Exported:
    """The folder after an export that was interrupted and then resumed."""
    from tests.workplace import LESS_DATA, Exported, interrupt_after_checkpoint

    interrupted = interrupt_after_checkpoint(place)
    left = tuple(sorted(path.name for path in place.folder.iterdir()))
    resumed = place.run(*place.export_arguments(), prelude=LESS_DATA)
    return Exported(place, interrupted, left, resumed)


@pytest.fixture(scope="session")
def packed(exported: Exported) -> Workplace:
    """The folder with its pack."""
    assert exported.resumed.returncode == 0, exported.resumed.stderr
    return exported.place
