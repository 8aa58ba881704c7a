"""How much of a training's time the ranks compute something needed, by the project's own packing; nothing is trained.

    python bench/balance.py

256 prompts of 5 completions in 2 updates, micro-batches of 16,384 tokens. Prompts have 300 to 2,000 tokens, completions
around 700 and at most 2,048, longer for some prompts than for others (both lognormal); half of the prompts are compared
with their other view. A row is four times its tokens where it is trained on (forward, its recomputation, backward) and
one more where it is compared; a micro-batch takes what its padded rows do, and the ranks' i-th ones end together.

where generated  every rank trains on what it has generated
dealt            `vogue.step.balance.deal`; "stays" is the share of rows that needn't be sent
"""

import argparse
from collections.abc import Sequence

import numpy as np

from vogue.model.packing import pack, spread
from vogue.step.balance import IDLE, IDLE_COMPARED, NOBODY, Load, Share, deal
from vogue.step.loader import NOISY_COST
from vogue.step.loader import deal as deal_prompts

PROMPTS, N, UPDATES, BUDGET, LONGEST = 256, 5, 2, 16_384, 2_048
TRAINED, COMPARED = 4, 1  # cost of a token


def generated(ranks: int, mixed: float, rng: np.random.Generator) -> list[list[list[Load]]]:
    """By update and rank, the rows of groups that are mixed: with this probability a group is."""
    prompts, noisy = rng.integers(300, 2000, PROMPTS), rng.random(PROMPTS) < 0.5
    lengths = rng.lognormal(np.log(600), 0.4, (PROMPTS, N)) * rng.lognormal(0, 0.5, (PROMPTS, 1))
    tokens = prompts + np.minimum(lengths, LONGEST).astype(int).sum(1)
    needed = rng.random(PROMPTS) < mixed
    found = []
    for part in np.split(np.arange(PROMPTS), UPDATES):
        shares = deal_prompts([prompts[i] * (NOISY_COST if noisy[i] else 1) for i in part], ranks)
        chosen = [[part[j] for j in share if needed[part[j]]] for share in shares]
        found.append(
            [
                [Load(rank, n, int(tokens[i]), ("noisy",) * int(noisy[i])) for n, i in enumerate(share)]
                for rank, share in enumerate(chosen)
            ]
        )
    return found


def where_generated(rows: Sequence[Sequence[Load]]) -> list[Share]:
    """Each rank's own rows, in as many micro-batches of each kind as the rank with most has."""
    packed = [pack(mine, BUDGET) for mine in rows]
    kinds = [[[m for m in mine if bool(m[0].others) == kind] for mine in packed] for kind in (True, False)]
    counts = [max(map(len, kind)) for kind in kinds]
    return [
        spread(with_others, counts[0], IDLE_COMPARED) + spread(without, counts[1], IDLE)
        for with_others, without in zip(*kinds, strict=True)
    ]


def cost(micro_batch: Sequence[Load]) -> int:
    """Of its rows, padded to the longest one."""
    compared = [load.tokens for load in micro_batch if load.others]
    trained = max(load.tokens for load in micro_batch) * len(micro_batch)
    return TRAINED * trained + COMPARED * max(compared, default=0) * len(compared)


def needed_and_taken(shares: Sequence[Share]) -> tuple[float, float]:
    """What the rows cost without padding, and what the ranks take together."""
    rows = [load for share in shares for micro_batch in share for load in micro_batch]
    needed = sum(load.tokens * (TRAINED + COMPARED * bool(load.others)) for load in rows)
    return needed, len(shares) * sum(max(map(cost, slot)) for slot in zip(*shares, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="steps that a share is of")
    repeats = parser.parse_args().repeats
    print("| ranks | mixed groups | where generated | dealt | stays |\n|---|---|---|---|---|")
    for ranks in (8, 32):
        for mixed in (0.3, 0.5, 0.8):
            rng = np.random.default_rng(0)
            steps = [part for _ in range(repeats) for part in generated(ranks, mixed, rng)]
            dealt = [deal([load for mine in part for load in mine], BUDGET, ranks) for part in steps]
            before = np.sum([needed_and_taken(where_generated(part)) for part in steps], axis=0)
            after = np.sum([needed_and_taken(shares) for shares in dealt], axis=0)
            at_home = [
                load.rank == rank
                for shares in dealt
                for rank, share in enumerate(shares)
                for micro_batch in share
                for load in micro_batch
                if load.rank != NOBODY
            ]
            figures = before[0] / before[1], after[0] / after[1], np.mean(at_home)
            print(f"| {ranks} | {mixed:.0%} |", " | ".join(f"{value:.0%}" for value in figures), "|")


if __name__ == "__main__":
    main()
