"""What calibrating a llama of given sizes has to hold in memory, by arithmetic, in bytes.

Counted are the tensors that grow with the model or the batch; what Python and its packages take is measured. Weights
are bfloat16, statistics float32. A phase is described by what stays in memory throughout it and by its largest moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.synthetic_models import Shape
from persona_edge.collect import CHUNK_TOKENS, GATE_TOKEN_STRIDE
from persona_edge.masks import GROUP_SIZE

__all__ = ["PHASES", "Job", "Phase", "phases"]

HALF, SINGLE = 2, 4  # bytes of bfloat16 and float32
# Bytes per weight while transformers 5.23 unpacks one tensor of Q6_K or Q4_K: measured, as it is not our code.
_UNPACKING_Q6, _UNPACKING_Q4 = 13, 7
_Q6, _Q4 = 210 / 256, 144 / 256  # bytes of a weight in the file


@dataclass(frozen=True)
class Job:
    """A model's sizes, tokens per batch, and whether blocks are streamed. `n_held_out`: tokens drift is measured on."""

    shape: Shape
    n_tokens: int
    is_streaming: bool
    n_held_out: int

    @property
    def linear(self) -> int:
        """Weights of one block's linear layers."""
        return sum(rows * columns for rows, columns in self._matrices)

    @property
    def block_weights(self) -> int:
        """Bytes of one block's weights."""
        return HALF * (self.linear + 2 * self.shape.hidden)

    @property
    def outer_weights(self) -> int:
        """Bytes of the embedding, the output matrix if it is another, and the last norm."""
        shape = self.shape
        return HALF * shape.hidden * (shape.n_vocab * (1 if shape.is_tied else 2) + 1)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.outer_weights + self.shape.n_layers * self.block_weights

    @property
    def field(self) -> int:
        """Bytes of one number per group of one block: a field of statistics, a damage, a key."""
        return SINGLE * self.linear // GROUP_SIZE

    @property
    def channels(self) -> int:
        """Bytes of one number per input and one per output of one block's layers."""
        return SINGLE * sum(rows + columns for rows, columns in self._matrices)

    @property
    def block_activations(self) -> int:
        """Bytes that one block keeps for the backward pass.

        Streamed: its input. Else two norms' float32 input and scale, and their outputs; queries, keys, values, what
        attention makes of them and its denominators; gate, its sigmoid linear unit, up, and the product.
        """
        shape, key = self.shape, self._key
        if self.is_streaming:
            return HALF * self.n_tokens * shape.hidden
        in_single = 2 * (shape.hidden + 1) + shape.n_heads
        in_half = 4 * shape.hidden + 2 * key + 4 * shape.feed_forward
        return self.n_tokens * (SINGLE * in_single + HALF * in_half)

    @property
    def largest(self) -> int:
        """Weights of a block's largest layer."""
        return max(rows * columns for rows, columns in self._matrices)

    @property
    def loading_moment(self) -> int:
        """Bytes while the file is read, which ends with the matrices around the blocks, beside the blocks' weights.

        The output matrix is unpacked while the embedding's bytes are read ahead, then the embedding beside it.
        """
        outer = self.shape.n_vocab * self.shape.hidden
        largest = _UNPACKING_Q6 * self.largest
        if self.shape.is_tied:
            return max(largest, int(outer * (_UNPACKING_Q6 + _Q6)))
        return max(largest, int(outer * (_UNPACKING_Q6 + _Q6 + _Q4)), int(outer * (HALF + _UNPACKING_Q4 + _Q4)))

    @property
    def fisher_moment(self) -> int:
        """Bytes while gates of a block's largest layer are squared: its weights by groups, a chunk's sums, twice."""
        chunk = min(CHUNK_TOKENS, -(-self.n_tokens // GATE_TOKEN_STRIDE))
        return HALF * self.largest + (HALF + SINGLE) * chunk * self.largest // GROUP_SIZE

    @property
    def gradient_moment(self) -> int:
        """Bytes while gate gradients of a block's largest layer are summed: weight gradient, times weights, summed."""
        return (2 * HALF + SINGLE) * self.largest

    @property
    def logits_moment(self) -> int:
        """Bytes while labels are sampled: logits as they come, as they are scored, their softmax, random numbers."""
        return (2 * HALF + 2 * SINGLE) * self.n_tokens * self.shape.n_vocab

    @property
    def output_moment(self) -> int:
        """Bytes while a CPU multiplies by the output matrix: a copy laid out for its kernel, and logits twice."""
        return HALF * self.shape.n_vocab * (self.shape.hidden + 2 * self.n_tokens)

    @property
    def base_predictions(self) -> int:
        """Bytes of the unmasked model's predictions on the held-out texts, float16."""
        return HALF * self.n_held_out * self.shape.n_vocab

    @property
    def device_peak(self) -> int:
        """Bytes on a GPU to which blocks are streamed: what is around them, one block, inputs, the largest moment."""
        inputs = self.shape.n_layers * HALF * self.n_tokens * self.shape.hidden
        inside = Job(self.shape, self.n_tokens, False, 0).block_activations
        block = self.block_weights + max(self.fisher_moment, self.gradient_moment) + inside
        # Logits are gone, but for their gradient, when the blocks' backward pass begins; to be safe, both are counted.
        return self.outer_weights + inputs + block + self.logits_moment

    @property
    def _key(self) -> int:
        return self.shape.hidden // self.shape.n_heads * self.shape.n_kv_heads

    @property
    def _matrices(self) -> tuple[tuple[int, int], ...]:
        hidden, forward = self.shape.hidden, self.shape.feed_forward
        attention = ((hidden, hidden), (self._key, hidden), (self._key, hidden), (hidden, hidden))
        return (*attention, (forward, hidden), (forward, hidden), (hidden, forward))


@dataclass(frozen=True)
class Phase:
    """Bytes that grow with each block, and bytes that do not, at a phase's largest moment.

    `mapped` are pages of the file: resident, but taken back by the system when it needs them, and not in `at`.
    """

    name: str
    per_block: int
    fixed: int
    mapped_per_block: int = 0
    mapped: int = 0

    def at(self, n_layers: int) -> int:
        """Bytes with that many blocks."""
        return self.fixed + n_layers * self.per_block


PHASES = ("loaded", "damage statistics", "damage of groups", "contrast gradients", "a pole's mask")


def phases(job: Job) -> tuple[Phase, ...]:
    """The phases in order, by PHASES. Statistics of web text and chat turns, then damage of both; the margins'; keys.

    During a backward pass a block's statistics appear while its activations go, so the larger of the two counts.
    """
    weights, outer, field, channels = job.block_weights, job.outer_weights, job.field, job.channels
    activations, predictions = job.block_activations, job.base_predictions
    fisher = outer + max(job.logits_moment, job.fisher_moment, job.output_moment)
    gradient = outer + predictions + max(job.gradient_moment, job.output_moment)
    matrix = job.shape.n_vocab * job.shape.hidden
    mapped = int(matrix * (_Q6 if job.shape.is_tied else _Q6 + _Q4))
    mask = 4 * field + field // 4  # damage of both texts, margins, keys, and a byte per group
    return (
        Phase(PHASES[0], weights, max(outer, job.loading_moment), int(job.linear * _Q4), mapped),
        Phase(PHASES[1], weights + field + channels + max(activations, field + channels), fisher),
        Phase(PHASES[2], weights + 4 * field + 2 * channels, outer + 3 * SINGLE * job.largest),
        Phase(PHASES[3], weights + 2 * field + max(activations, field), gradient),
        Phase(PHASES[4], weights + max(mask, 2 * field + max(activations, field)), gradient),
    )
