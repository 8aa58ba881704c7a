"""The samples that a step trains on and the views of their images, loaded while the step before is trained.

Which samples, in which order, with which perturbations and draws: all of it is a function of the seed and the step, so
that a resumed run, and one on another number of ranks, sees the same. What isn't, such as past pass rates, is read from
the run's settled state (`vogue.step.run_state`).
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image

from vogue.config import Config
from vogue.data import DataError, Sample
from vogue.data.dataset import Checked
from vogue.data.videos import Clip
from vogue.distributed import one_openmp_thread
from vogue.inputs import NOISY, RAW, Preprocessor, Prompt, View
from vogue.method import branch, variance
from vogue.method.perturb import annealed, perturb
from vogue.method.replay import drawn_by_tier
from vogue.seeds import Purpose, rng_for, seed_for
from vogue.settings import ConfigError
from vogue.step.run_state import RunState

SCORES = "prompt_scores"  # the run's state under this name: OVS and TDS (S, 2) of the samples
REPLAYABLE = "replay_prompts"  # and under this: `index` and `mean` R̄ (S,) of the samples that the replay buffer has
REMAKING_THREADS = 4
NOISY_COST = 4 / 3  # of training on a group with z = 1, in that of another one: it adds a forward without gradient


class Origin(NamedTuple):
    """All that an item is made of, beside the seed and the step; a few bytes, which any rank can make it again from."""

    index: int  # of the sample in the data
    number: int  # of the prompt in its step, over all ranks and rounds
    draws: tuple[bool, ...]  # (G,) z of each completion


@dataclass(frozen=True)
class Item:
    """A prompt of a step, with its images in views by name; only the views that the step reads are made."""

    number: int  # of the prompt in its step, over all ranks and rounds
    prompt: Prompt
    views: Mapping[str, View]
    draws: tuple[bool, ...]  # (G,) z of each completion
    update: int = 0  # which of the step's optimizer updates trains on it
    skipped: int = 0  # samples before it that were to be here and are broken
    index: int | None = None  # of its sample in the data, where `Loader.items` chose it

    @property
    def origin(self) -> Origin:
        """Raises ValueError for an item that `Loader.items` hasn't made."""
        if self.index is None:
            raise ValueError(
                f"prompt {self.number} isn't one of the loader's choice: no other rank could make it again"
            )
        return Origin(self.index, self.number, self.draws)


class Loader:
    """Loads this rank's items of a step. Raises `DataError` for a sample that can't be used."""

    def __init__(
        self,
        config: Config,
        data: Checked,
        preprocessor: Preprocessor,
        state: RunState,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.config, self.preprocessor, self.state = config, preprocessor, state
        self.samples, self.lengths = data.samples, data.lengths
        self.rank, self.ranks = rank, ranks
        _check_split(config, ranks)
        self._background = ThreadPoolExecutor(max_workers=1, initializer=one_openmp_thread)
        self._ahead: tuple[int, Future[list[Item]]] | None = None

    def load_ahead(self, step: int) -> list[Item]:
        """`items` of the step; those of the next one are loaded from now on, while this one trains."""
        ahead, self._ahead = self._ahead, None
        items = ahead[1].result() if ahead and ahead[0] == step else self.items(step)
        # The next step's items may not see what this step does to the state: whether it has done it already by the time
        # they are loaded is chance, and a resumed run would find it done.
        self.state.settle()
        # A step that measures all prompts anew chooses its own by what it finds.
        if step + 1 < self.config.trainer.steps and not self.config.sampling.refreshes(step + 1):
            self._ahead = step + 1, self._background.submit(self.items, step + 1)
        return items

    def items(self, step: int, number: int = 0) -> list[Item]:
        """This rank's prompts of the step's round `number`.

        Every step has its place in the order of samples for all rounds it may have, so that nothing needs remembering.
        """
        rollout = self.config.rollout
        p = branch.noisy_probability(step, self.config.trainer.steps, self.config.branch.probability)
        seed, total, first = self.config.seed, rollout.prompts * rollout.rounds, rollout.prompts * number
        branch_seed = seed_for(seed, Purpose.BRANCH)
        drawn = branch.draw(self.config.branch.granularity, total, rollout.n, p, branch_seed, step)
        draws = drawn[first : first + rollout.prompts]
        order = self._order(step, number)
        costs = [self.lengths[i] * (NOISY_COST if z.any() else 1) for i, z in zip(order, draws, strict=True)]
        size = rollout.prompts // self.config.trainer.updates
        mine = [
            start + i
            for start in range(0, rollout.prompts, size)  # an update's prompts, shared by all ranks
            for i in deal(costs[start : start + size], self.ranks)[self.rank]
        ]
        items = (self._usable_item(order[i], step, first + i, tuple(draws[i].tolist())) for i in mine)
        return [replace(item, update=i // size) for i, item in zip(mine, items, strict=True)]

    def _order(self, step: int, number: int) -> list[int]:
        """Indices of the samples of the step's round `number`, some of them drawn by what is known of each sample."""
        settings, rollout, seed = self.config.sampling, self.config.rollout, self.config.seed
        scored, replayed = settings.scored(rollout.prompts), self.config.replay.drawn(rollout.prompts)
        uniform = rollout.prompts - scored - replayed
        order = sample_order(len(self.samples), (step * rollout.rounds + number) * uniform, uniform, seed)
        if replayed:
            return variance.interleaved(self._replayable(replayed, step, number), order)
        if not scored:
            return order
        known = self.state.settled.get(SCORES)
        known = variance.unseen(len(self.samples)) if known is None else known
        scores = variance.scores(known, settings.outcome, settings.diversity, normalise=settings.normalise)
        rng = rng_for(seed, Purpose.SCORED, step, number)
        return variance.interleaved(variance.drawn(scores, scored, rng), order)

    def _replayable(self, count: int, step: int, number: int) -> list[int]:
        """`count` samples of which the replay buffer has something; any others where it hasn't as many."""
        rng, known = rng_for(self.config.seed, Purpose.REPLAY, step, number, 0), self.state.settled.get(REPLAYABLE)
        found: list[int] = []
        if known is not None:
            places = drawn_by_tier(known["mean"].tolist(), count, self.config.replay.tiers, rng)
            found = known["index"][places].tolist()
        return found + rng.choice(len(self.samples), count - len(found)).tolist()

    def _usable_item(self, position: int, step: int, number: int, draws: tuple[bool, ...]) -> Item:
        """The item of a sample, or with `data.broken=skip` of the first behind it that can be used."""
        for skipped in range(len(self.samples)):
            try:
                index = (position + skipped) % len(self.samples)
                return replace(self.item(self.samples[index], step, number, draws), skipped=skipped, index=index)
            except DataError:
                if self.config.data.broken == "refuse":
                    raise
        raise DataError("data.broken=skip: there is no sample left that can be used")

    def again(self, origins: Sequence[Origin], step: int) -> dict[Origin, Item]:
        """The items of other ranks, made again: the same tokens and pixels. Raises `DataError` with the first bad one.

        In threads, since the ranks wait for it: decoding and T(x) leave the interpreter's lock to one another.
        """
        with ThreadPoolExecutor(REMAKING_THREADS, initializer=one_openmp_thread) as pool:
            made = pool.map(lambda o: self.item(self.samples[o.index], step, o.number, o.draws), origins)
            return dict(zip(origins, made, strict=True))

    def item(self, sample: Sample, step: int, number: int, draws: tuple[bool, ...]) -> Item:
        """Prompt `number` of the step, perturbed where a draw, the loss or a measuring step reads T(x)."""
        config, settings = self.config, self.config.perturb
        images, clips = self.preprocessor.images(sample), self.preprocessor.clips(sample)
        reads_noisy = any(draws) or config.rollout.noisy_count or config.compares or config.trainer.measures(step)
        try:
            views = {RAW: self.preprocessor.view(images, clips)}
            if reads_noisy:
                given = settings.model_dump(exclude={"anneal_at"})
                if settings.anneal_at is not None:
                    given["sigma"] = annealed(settings.sigma, step, config.trainer.steps, settings.anneal_at)
                views[NOISY] = self._perturbed(images, clips, given, Purpose.PERTURB, step, number)
            views |= self._degraded(images, clips, step, number)
        except (OSError, ValueError) as error:
            raise DataError(f"{sample.place}: {error}") from error
        return Item(number, self.preprocessor.prompt(sample, views[RAW]), views, draws)

    def _degraded(
        self, images: Sequence[Image.Image], clips: Sequence[Clip], step: int, number: int
    ) -> dict[str, View]:
        """ROMA's views, their strengths in an order of the prompt's own, so that the first is one of them by chance."""
        robust, seed = self.config.robust, self.config.seed
        order = rng_for(seed, Purpose.DEGRADE, step, number).permutation(len(robust.views))
        return {
            name: self._perturbed(images, clips, {"sigma": robust.sigma[k]}, Purpose.DEGRADE, step, number, int(k))
            for name, k in zip(robust.views, order, strict=True)
        }

    def _perturbed(
        self,
        images: Sequence[Image.Image],
        clips: Sequence[Clip],
        settings: Mapping[str, Any],
        purpose: Purpose,
        *where: int,
    ) -> View:
        """T(x) of all images and videos, each by a draw of its own place."""
        seeds = [seed_for(self.config.seed, purpose, *where, i) for i in range(len(images) + len(clips))]
        copies = [perturb(x, **settings, seed=seed) for x, seed in zip(images, seeds, strict=False)]
        moving = [perturbed(x, seed, settings) for x, seed in zip(clips, seeds[len(images) :], strict=True)]
        return self.preprocessor.view(copies, moving)


def perturbed(clip: Clip, seed: int, settings: Mapping[str, Any]) -> Clip:
    """T(x) of a video: every frame alike, by the same draws."""
    return replace(clip, frames=tuple(perturb(frame, **settings, seed=seed) for frame in clip.frames))


def sample_order(size: int, start: int, count: int, seed: int) -> list[int]:
    """Indices of samples number `start` to `start + count` of an endless sequence of shuffled epochs."""
    order: list[int] = []
    epoch, offset = divmod(start, size)
    while len(order) < count:
        shuffled = rng_for(seed, Purpose.DATA, epoch).permutation(size)
        order += shuffled[offset : offset + count - len(order)].tolist()
        epoch, offset = epoch + 1, 0
    return order


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Share out numbers 0 to len(costs) - 1, equally many a rank and of nearly equal cost, in ascending order each.

    They are dealt from the most expensive on, to and fro: 0 1 2 2 1 0 0 1 ...
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place, i in enumerate(sorted(range(len(costs)), key=lambda i: -costs[i])):
        lap, rank = divmod(place, ranks)
        shares[rank if lap % 2 == 0 else ranks - 1 - rank].append(i)
    return [sorted(share) for share in shares]


def _check_split(config: Config, ranks: int) -> None:
    per_update = config.rollout.prompts // config.trainer.updates
    if per_update % ranks:
        raise ConfigError(
            f"rollout.prompts / trainer.updates = {per_update} prompts an update can't be shared by {ranks} ranks"
        )
