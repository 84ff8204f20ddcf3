"""Batched generation by transformers, in the trainer's own process and on its own weights.

A row of the batch is a distinct prefix: each prompt is prefilled once, and samples of a group share a row as long as
their tokens are equal. Its key-value cache is copied where they part. Finished rows leave the batch. Tokens are drawn
by inverse transform sampling, with one uniform number per token from the reply's own seed, so a reply does not depend
on the rest of the batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expo.errors import ConfigError, first_line
from expo.learner.model import check_dtype, head_logits, run_transformer, takes_input
from expo.learner.model_checks import LENGTHS, token_ids
from expo.rollout.engine import GenerationRequest, Sampling, end_ids
from expo.rollout.weight_samples import WeightDescription, describe
from expo.types import Reply
from expo_kernels import token_logps

CHECKED_TOKENS = 4
LOGP_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.3}  # nats, of logits whose rounding is a hundredth of it
# a model's argument for its cache: in new versions of transformers, in earlier ones, and there in Mamba's kind
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
KEEP_ROWS_ABOVE = 0.75  # share of rows in use; dropping the others copies the cache, so it is done below


class TransformersEngine:
    """Samples from the current weights of `model`.

    Args:
        model: a transformers causal language model: the policy's own, or a copy that `load_weights` updates.
        tokenizer: its tokenizer, with an end-of-sequence token.
        batch_size: most replies generated at once.
        dtype: of the transformer's matrix products, as in the policy; logits are float32.
        is_shared: whether `model` is the policy's own, so that no weight sync is needed.
        stop_tokens: tokens that end a reply, beside the end-of-sequence tokens.
        is_exact: whether each request is a batch of its own, whatever `batch_size` is.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        *,
        is_shared: bool = True,
        stop_tokens: Sequence[str] = (),
        is_exact: bool = False,
    ) -> None:
        self._model = model
        self._is_shared = is_shared
        self._dtype = dtype
        self._tokenizer = tokenizer
        self._batch_size, self._is_exact = batch_size, is_exact
        self._end_ids = end_ids(model, tokenizer, stop_tokens)
        self._cache_name = next((name for name in CACHE_NAMES if takes_input(model, name)), CACHE_NAMES[-1])
        self._is_checked = is_shared

    @property
    def needs_weight_sync(self) -> bool:
        """Whether `model` is a copy of the policy's."""
        return not self._is_shared

    @property
    def takes_adapters(self) -> bool:
        """False: `model` has no adapters of its own."""
        return False

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """For each request one reply per seed, in order."""
        replies: list[list[Reply | None]] = [[None] * len(request.seeds) for request in requests]
        for jobs in self._batches(requests):
            prompts = [requests[job.request].prompt_ids for job in jobs]
            seeds = [requests[job.request].seeds[sample] for job in jobs for sample in job.samples]
            repeats = [len(job.samples) for job in jobs]
            done = iter(self._generate_batch(prompts, repeats, seeds, sampling))
            for job in jobs:
                for sample in job.samples:
                    replies[job.request][sample] = next(done)
            if on_progress is not None:
                on_progress(len(seeds))
        return [[reply for reply in group if reply is not None] for group in replies]

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the policy's weights into `model`, unless it is the policy's own."""
        if self._is_shared:
            return
        parameters = dict(self._model.named_parameters())
        for name, value in weights:
            parameters[name].copy_(value)
        if not self._is_checked:
            self._is_checked = True
            self.check()

    def check(self) -> None:
        """Checks that sampling with a cache, from prompts of unequal lengths, computes what a forward pass computes.

        Some families keep other states than keys and values, or read the padding before a prompt.

        Raises: ConfigError, which names the family.
        """
        family, dtype = self._model.config.model_type, self._dtype
        prompts = [token_ids(self._model, length) for length in LENGTHS for _ in range(2)]
        problem = "log-probs with and without its cache differ"
        self._dtype = check_dtype(self._model)
        try:
            replies = self._generate_batch(
                prompts[::2], [2] * len(LENGTHS), range(2 * len(LENGTHS)), Sampling(1.0, CHECKED_TOKENS)
            )
            scores = self._score(prompts, [reply.token_ids for reply in replies], 1.0)
            differences = [
                abs(logp - score)
                for reply, scored in zip(replies, scores, strict=True)
                for logp, score in zip(reply.logps, scored, strict=True)
            ]
            is_right = all(difference <= LOGP_TOLERANCE[self._dtype] for difference in differences)
        except Exception as error:  # families raise many unrelated types
            is_right, problem = False, f"{type(error).__name__}: {first_line(error)}"
        finally:
            self._dtype = dtype
        if not is_right:
            raise ConfigError(
                f"rollout.engine = transformers cannot sample from models of the family {family} ({problem}); take "
                f"rollout.engine = vllm, or choose another model"
            )

    def score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Log-probability in nats of every token of given replies, by one forward pass for each reply."""
        return self._score(prompts, replies, temperature)

    @torch.inference_mode()
    def _score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        found = []
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = torch.tensor([[*prompt, *reply]], device=self._model.device)
            output = run_transformer(self._model, self._dtype, input_ids=ids, use_cache=False)
            logits = head_logits(self._model, output.last_hidden_state[0, len(prompt) - 1 : -1], self._dtype)
            found.append(token_logps(logits[None], ids[:, len(prompt) :], temperature=temperature)[0].tolist())
        return found

    def describe_weights(self) -> list[dict[str, WeightDescription]]:
        """The parameters of `model`."""
        return [describe(self._model.named_parameters())]

    def sleep(self) -> None:
        """Does nothing: between calls the engine holds no memory but the model."""

    def close(self) -> None:
        """Does nothing: the engine has started no process."""

    def _batches(self, requests: Sequence[GenerationRequest]) -> list[list["_Job"]]:
        """Requests sorted by prompt length, split into batches of at most batch_size replies."""
        if self._is_exact:
            return [[_Job(number, list(range(len(request.seeds))))] for number, request in enumerate(requests)]
        batches: list[list[_Job]] = []
        free = 0
        for request in sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids)):
            samples = list(range(len(requests[request].seeds)))
            while samples:
                if free == 0:
                    batches.append([])
                    free = self._batch_size
                batches[-1].append(_Job(request, samples[:free]))
                num_added, samples = len(samples[:free]), samples[free:]
                free -= num_added
        return batches

    @torch.inference_mode()
    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        repeats: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> list[Reply]:
        was_training = self._model.training
        self._model.eval()
        state = self._prefill(prompts)
        device = state.logits.device
        uniforms = _uniforms(seeds, sampling.max_new_tokens).to(device)
        tokens: list[list[int]] = [[] for _ in seeds]
        logps: list[list[float]] = [[] for _ in seeds]
        rows = torch.arange(len(seeds))  # replies that have not ended
        prefixes = torch.arange(len(prompts)).repeat_interleave(torch.tensor(repeats)).to(device)  # of these in `state`
        for position in range(sampling.max_new_tokens):
            drawn, drawn_logps = _draw(state.logits[prefixes], uniforms[rows.to(device), position], sampling)
            for row, token, logp in zip(rows.tolist(), drawn.tolist(), drawn_logps.tolist(), strict=True):
                tokens[row].append(token)
                logps[row].append(logp)
            running = torch.tensor([tokens[row][-1] not in self._end_ids for row in rows.tolist()])
            if not running.any() or position + 1 == sampling.max_new_tokens:
                break
            rows, on_device = rows[running], running.to(device)
            prefixes = self._advance(state, prefixes[on_device], drawn[on_device])
        self._model.train(was_training)
        return [self._reply(ids, values) for ids, values in zip(tokens, logps, strict=True)]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> "_State":
        device = self._model.device
        longest = max(len(prompt) for prompt in prompts)
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, longest - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = run_transformer(
            self._model,
            self._dtype,
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=True,
        )
        logits = head_logits(self._model, output.last_hidden_state[:, -1], self._dtype)
        cache = getattr(output, self._cache_name)
        return _State(cache, mask.to(device), positions.to(device)[:, -1:], logits)

    def _advance(self, state: "_State", prefixes: Tensor, drawn: Tensor) -> Tensor:
        """Appends to the prefix of each running reply the token drawn for it; equal results are computed once.

        Args:
            state: of the prefixes.
            prefixes: [R] int64, the row of `state` that each reply continues.
            drawn: [R] int64, its next token.

        Returns: [R] int64, the rows of the longer prefixes.
        """
        num_tokens = state.logits.shape[-1]
        distinct: Tensor
        replies: Tensor
        distinct, replies = torch.unique(prefixes * num_tokens + drawn, return_inverse=True)  # sorted
        parents, next_tokens = distinct // num_tokens, distinct % num_tokens
        is_branching = bool((parents[1:] == parents[:-1]).any())
        if is_branching or len(parents) <= KEEP_ROWS_ABOVE * len(state.mask):
            state.select(parents)
        else:  # rows without a reply are computed on: less work than copying the cache without them
            kept = next_tokens.new_zeros(len(state.mask))
            next_tokens, replies = kept.index_copy(0, parents, next_tokens), parents[replies]
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(state.mask), 1)], dim=1)
        state.position = state.position + 1
        output = run_transformer(
            self._model,
            self._dtype,
            input_ids=next_tokens[:, None],
            attention_mask=state.mask,
            position_ids=state.position,
            use_cache=True,
            **{self._cache_name: state.cache},
        )
        state.logits = head_logits(self._model, output.last_hidden_state[:, -1], self._dtype)
        return replies

    def _reply(self, token_ids: list[int], logps: list[float]) -> Reply:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return Reply(token_ids, logps, token_ids[-1] not in self._end_ids, text)


@dataclass(frozen=True)
class _Job:
    """Some samples of one request."""

    request: int
    samples: list[int]


@dataclass
class _State:
    """The distinct prefixes (prompt and tokens so far) of running replies: cache, attention mask [B, T], last position
    [B, 1], next logits [B, V].
    """

    cache: Any
    mask: Tensor
    position: Tensor
    logits: Tensor

    def select(self, rows: Tensor) -> None:
        """Replaces the rows by those at `rows`, which may repeat."""
        self.cache.reorder_cache(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]  # the logits are replaced next


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """[len(seeds), count] uniform numbers in [0, 1), each row from its own seed."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(seed)) for seed in seeds])


def _draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row of logits [B, V] by inverse transform sampling, and its log-probability in nats."""
    temperature = sampling.temperature
    if temperature == 0:
        return logits.argmax(dim=-1), torch.zeros_like(uniforms)
    if sampling.top_p < 1:
        logits = _nucleus(logits.float(), sampling)
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    # float32 probabilities need not sum to 1, and the threshold must stay below their sum
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, threshold, right=True)
    return drawn[:, 0], token_logps(logits[:, None], drawn, temperature=temperature)[:, 0]


def _nucleus(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits [B, V], with -inf for tokens outside the nucleus of probability `top_p`.

    Source: Holtzman et al., arXiv 1904.09751, section 3.1; the token that reaches top_p is in the nucleus.
    """
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    sorted_probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    preceding = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
    is_outside = preceding >= sampling.top_p
    return logits.masked_fill(is_outside.scatter(-1, order, is_outside), -torch.inf)
