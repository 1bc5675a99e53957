"""The ways to make a loaded ONNX model into a persona and back; `onnx_mechanism` chooses among them.

    MappedEditor    writes into the packed weights of the live session; the fastest, and as exact as a fresh session
    ScalesEditor    arithmetic in float32, whose scales ONNX Runtime reads where we keep them; plain memory writes
    SessionEditor   a new session with masked initializers for each persona; always works

All have the same face: `session` is what to run, `apply` and `restore` change the persona. They are not locked and know
nothing of KV caches: the caller does not run the session during a switch and forgets its cache afterwards.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import UnsupportedModelError, WeightAccessError
from persona_edge.onnx_model import OnnxMatrix, OnnxModel
from persona_edge.runtime.onnx_mapping import MappedSession
from persona_edge.runtime.onnx_masks import check_program, gated_blocks, gates_scales_only, masked_initializers
from persona_edge.runtime.onnx_packing import ScalePlaces, packed_images
from persona_edge.runtime.onnx_patches import (
    Patch,
    PatchPlan,
    Recent,
    Way,
    Written,
    key_of,
    n_bytes_of,
    patch_of,
    way_between,
)
from persona_edge.runtime.onnx_prepared import PreparedModel, save_arrays
from persona_edge.runtime.onnx_runtime import make_session
from persona_edge.runtime.programs import PersonaProgram

__all__ = ["Editor", "MappedEditor", "Mechanism", "ScalesEditor", "SessionEditor"]

_MOST_PLANS = 48 << 20  # bytes that plans may take, and as many the ways between them
Mechanism = Literal["mapped", "images", "scales", "session"]


class Editor(Protocol):
    """A session and the way to change its weights."""

    mechanism: Mechanism

    @property
    def session(self) -> Any:
        """The InferenceSession to run now; another one may take its place with each `apply` and `restore`."""

    def check(self, program: PersonaProgram) -> None:
        """Raise what `apply` would raise before writing, and write nothing."""

    def apply(self, program: PersonaProgram) -> Written:
        """CHANGES the weights to be `program`, whatever they are now. A failure leaves base."""

    def restore(self) -> Written:
        """Back to base, bit for bit."""

    def digest(self) -> str:
        """SHA-256 over the weights in use: equal digests mean equal weights."""

    def close(self) -> None:
        """Let go of session and memory."""


class _PatchingEditor(ABC):
    """What editors that write memory share: plans of patches, and the way from one to the next."""

    def __init__(self, model: OnnxModel) -> None:
        self._weights = model.weights
        self._plans: Recent[PatchPlan] = Recent(_MOST_PLANS)
        self._ways: Recent[Way] = Recent(_MOST_PLANS)
        self._active: PatchPlan | None = None
        self._torn: tuple[PatchPlan, ...] = ()  # what an interrupted switch may have left anywhere in between

    def check(self, program: PersonaProgram) -> None:
        check_program(program, self._weights)
        self._plan(program)

    def apply(self, program: PersonaProgram) -> Written:
        check_program(program, self._weights)
        if self._torn:
            self.restore()
        before, after = self._active, self._plan(program)
        if after is before:
            return Written(0, 0)
        way = self._ways.get((before, after), lambda: way_between(before, after))
        self._torn = (after,) if before is None else (before, after)
        try:
            for step in way.steps:
                step.memory[step.at] = step.values
        except BaseException:
            self.restore()
            raise
        self._active, self._torn = after, ()
        return way.written

    def restore(self) -> Written:
        plans = self._torn or (() if self._active is None else (self._active,))
        self._torn = plans
        steps = [step for plan in plans for step in plan.undoing()]
        for step in steps:
            step.memory[step.at] = step.values
        self._active, self._torn = None, ()
        return Written(sum(plan.program.n_units for plan in plans), n_bytes_of(steps))

    def _plan(self, program: PersonaProgram) -> PatchPlan:
        return self._plans.get(key_of(program), lambda: PatchPlan(program, self._make_patches(program)))

    def _forget(self) -> None:
        self._plans.clear()
        self._ways.clear()
        self._active, self._torn = None, ()

    @abstractmethod
    def _make_patches(self, program: PersonaProgram) -> tuple[Patch, ...]:
        """What to write into base weights for `program`. Raises UnsupportedModelError when it cannot be written so."""


class MappedEditor(_PatchingEditor):
    """Writes into the mapped packed weights.

    With `places` (by matrix name) group masks are computed on the spot, at any strength. Without them, and for masks of
    single weights, ONNX Runtime packs the masked matrices once; the bytes that differ are kept in the cache.
    """

    def __init__(
        self, model: OnnxModel, prepared: PreparedModel, mapped: MappedSession, places: Mapping[str, ScalePlaces] | None
    ) -> None:
        super().__init__(model)
        self.mechanism: Mechanism = "images" if places is None else "mapped"
        self._prepared, self._places = prepared, places
        self._mapped: MappedSession | None = mapped

    @property
    def session(self) -> Any:
        return self._live.session

    @property
    def _live(self) -> MappedSession:
        if self._mapped is None:
            raise WeightAccessError("this session is closed; open the model again")
        return self._mapped

    def digest(self) -> str:
        sha = hashlib.sha256()
        for name in sorted(self._live.blobs):
            for memory in self._live.blobs[name]:
                sha.update(memory.data)
        return sha.hexdigest()

    def close(self) -> None:
        self._forget()
        self._mapped = None

    def _make_patches(self, program: PersonaProgram) -> tuple[Patch, ...]:
        if self._places is not None and gates_scales_only(program, self._weights):
            return self._scale_patches(program, self._places)
        return self._image_patches(program)

    def _scale_patches(self, program: PersonaProgram, places: Mapping[str, ScalePlaces]) -> tuple[Patch, ...]:
        patches = []
        for gated in gated_blocks(program, self._weights):
            found = places[gated.matrix.name]
            at, values = found.fields(gated.blocks, gated.masked_scales())
            _, base = found.fields(gated.blocks, gated.base_scales())
            patches += [patch_of(_floats(memory), at, values, base) for memory in self._live.blobs[gated.matrix.name]]
        return tuple(patches)

    def _image_patches(self, program: PersonaProgram) -> tuple[Patch, ...]:
        blobs, path = self._live.blobs, self._prepared.folder / "images" / f"{_digest_of(program)}.npz"
        try:
            with np.load(path, allow_pickle=False) as kept:
                found = {str(n): (kept[f"at{i}"], kept[f"values{i}"]) for i, n in enumerate(kept["names"])}
        except (OSError, ValueError, KeyError, EOFError):
            found = self._pack_persona(program)
            arrays = {f"{kind}{i}": pair[k] for i, pair in enumerate(found.values()) for k, kind in enumerate(_KINDS)}
            save_arrays(path, names=np.array(list(found)), **arrays)
        base = np.memmap(self._prepared.data, np.uint8, "r")
        starts = {name: self._prepared.blobs[name].offset for name in found}
        return tuple(
            patch_of(memory, at, values, base[starts[n] + at])
            for n, (at, values) in found.items()
            for memory in blobs[n]
        )

    def _pack_persona(self, program: PersonaProgram) -> dict[str, tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """By matrix: which bytes of its blob differ from base, and what they become."""
        matrices = _matrices_of(program, self._weights)
        images = packed_images(matrices, masked_initializers(program, self._weights))
        data = np.memmap(self._prepared.data, np.uint8, "r")
        found = {}
        for matrix in matrices:
            blob, image = self._prepared.blobs.get(matrix.name), images.get(matrix.name)
            if blob is None or image is None or len(image) != blob.n_bytes:
                raise UnsupportedModelError(f"ONNX Runtime packs {matrix.name} in a way that cannot be edited in place")
            at = np.flatnonzero(data[blob.offset : blob.offset + blob.n_bytes] != image)
            found[matrix.name] = (at, image[at])
        return found


_KINDS: Final = ("at", "values")


class ScalesEditor(_PatchingEditor):
    """Writes into scales that the session reads from our memory; its arithmetic is float32 (accuracy level 1)."""

    mechanism: Mechanism = "scales"

    def __init__(self, model: OnnxModel, session: Any, scales: Mapping[str, NDArray[np.float32]]) -> None:
        """`scales` are the session's own, by matrix name, flat."""
        super().__init__(model)
        self._session: Any = session
        self._scales = dict(scales)

    @property
    def session(self) -> Any:
        return self._session

    def digest(self) -> str:
        sha = hashlib.sha256()
        for name in sorted(self._scales):
            sha.update(self._scales[name].data)
        return sha.hexdigest()

    def close(self) -> None:
        self._forget()
        self._session, self._scales = None, {}

    def _make_patches(self, program: PersonaProgram) -> tuple[Patch, ...]:
        if not gates_scales_only(program, self._weights):
            raise UnsupportedModelError(
                "masks of single weights cannot be applied to scales; open the model with mechanism='session'"
            )
        return tuple(
            patch_of(self._scales[gated.matrix.name], gated.blocks, gated.masked_scales(), gated.base_scales())
            for gated in gated_blocks(program, self._weights)
        )


class SessionEditor:
    """Makes a new session for each persona: as exact as it gets, and as slow as loading the model."""

    mechanism: Mechanism = "session"

    def __init__(self, model: OnnxModel, *, n_threads: int) -> None:
        self._model, self._n_threads = model, n_threads
        self._session: Any = make_session(model.path, n_threads=n_threads)
        self._changed: dict[str, NDArray[Any]] = {}
        self._n_units = 0

    @property
    def session(self) -> Any:
        return self._session

    def check(self, program: PersonaProgram) -> None:
        check_program(program, self._model.weights)

    def apply(self, program: PersonaProgram) -> Written:
        self.check(program)
        changed = masked_initializers(program, self._model.weights)
        self._session = make_session(self._model.path, n_threads=self._n_threads, initializers=changed)
        self._changed, self._n_units = changed, program.n_units
        return Written(program.n_units, sum(values.nbytes for values in changed.values()))

    def restore(self) -> Written:
        if not self._changed:
            return Written(0, 0)
        n_units, n_bytes = self._n_units, sum(values.nbytes for values in self._changed.values())
        self._session = make_session(self._model.path, n_threads=self._n_threads)
        self._changed, self._n_units = {}, 0
        return Written(n_units, n_bytes)

    def digest(self) -> str:
        sha = hashlib.sha256()
        for name in sorted(self._changed):
            sha.update(name.encode())
            sha.update(np.ascontiguousarray(self._changed[name]).data)
        return sha.hexdigest()

    def close(self) -> None:
        self._session, self._changed = None, {}


def _floats(blob: NDArray[np.uint8]) -> NDArray[np.float32]:
    return blob[: len(blob) // 4 * 4].view("<f4")


def _matrices_of(program: PersonaProgram, weights: Mapping[str, Any]) -> list[OnnxMatrix]:
    return list({weights[name].matrix.name: weights[name].matrix for name in program.names}.values())


def _digest_of(program: PersonaProgram) -> str:
    sha = hashlib.sha256("\n".join(program.names).encode())
    for array in (program.granularities, program.starts, program.positions, program.gates[program.mixes]):
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()[:32]
