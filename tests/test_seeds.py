from itertools import product

from vogue.seeds import Purpose, rng_for, seed_for


def test_purpose_and_place_give_each_thing_a_seed_of_its_own():
    places = [
        (seed, purpose, step, number) for seed, purpose, step, number in product((0, 1), Purpose, range(30), (0, 1))
    ]
    seeds = {seed_for(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**31 for seed in seeds)  # vLLM and torch take these


def test_a_seed_depends_on_nothing_else():
    assert seed_for(3, Purpose.ROLLOUT, 5, 7) == seed_for(3, Purpose.ROLLOUT, 5, 7)
    first = rng_for(3, Purpose.DATA, 5)
    first.random(10)
    assert rng_for(3, Purpose.DATA, 5).random() == rng_for(3, Purpose.DATA, 5).random()
