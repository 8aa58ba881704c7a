"""`vogue data show` and `vogue data check`, and what a run does with such data."""

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from vogue.cli import main
from vogue.data import DataError, Sample, load_samples, write_parquet
from vogue.data.dataset import check_samples
from vogue.inputs import Preprocessor, load_processor

RED = Image.new("RGB", (56, 28), (255, 0, 0))
ROW = {"problem": "<image>How many?", "answer": "3", "images": ["red.png"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    from vogue.data import dataset

    monkeypatch.setattr(dataset, "DECODED", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    """A function: a file of rows, each with changes of a good one, and red.png beside it."""
    RED.save(tmp_path / "red.png")

    def build(*changes):
        (tmp_path / "rows.json").write_text(json.dumps([ROW | change for change in changes]))
        return str(tmp_path / "rows.json")

    return build


def run(capsys, *arguments):
    """Exit code and what was printed, as one line of words."""
    code = main(["data", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, " ".join((printed.out + printed.err).split())


# ------------------------------------------------------------------------------------------------------------- show


def test_a_sample_is_shown_as_the_model_sees_it(write, model_folder, capsys):
    path = write({}, {"problem": "Two <image>?", "level": 5})
    code, shown = run(capsys, "show", path, f"model.path={model_folder}", "--row", 1)
    processor = load_processor(str(model_folder))
    (length,) = Preprocessor(processor, "", 512).lengths([load_samples(path)[0]])
    assert code == 0
    assert "<|im_start|>user Two <|vision_start|><|image_pad|><|vision_end|>?<|im_end|>" in shown
    assert "image 1: 56 x 28 pixels" in shown
    assert "answer: 3" in shown
    assert "column level: 5" in shown
    assert "odd" not in shown
    _, shown = run(capsys, "show", path, f"model.path={model_folder}", "data.system_prompt=")
    assert f"tokens: {length}, 2 of them of images; at most 2048" in shown
    assert "odd: nothing in the prompt asks for \\boxed{}, which reward.design=verifiable reads" in shown


def test_without_a_model_what_needs_none_is_shown(write, capsys):
    code, shown = run(capsys, "show", write({}), "data.max_pixels=392")
    assert code == 0
    assert "<image>How many?" in shown
    assert "image 1: 56 x 28 pixels answer: 3" in shown
    assert "model.path=MODEL shows" in shown


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"problem": "<image>See ![](a.png)"},
            r"the question has '!\[\]\(a.png\)' as plain text; <image> is what marks",
        ),
        ({"problem": "How many?", "images": []}, r"there is no image: raw and noisy views are alike"),
        ({"answer": "}{"}, r"a completion that gives the answer '\}\{' as it stands there would not be right"),
        ({"answer": "It is 3, because " * 20}, r"the answer has 340 characters: is it a solution"),
        ({"problem": "<image>a<|im_end|>b"}, r"the text spells special tokens, which stay plain text: <\|im_end\|>"),
    ],
)
def test_what_looks_odd_is_said(write, model_folder, capsys, change, line):
    _, shown = run(capsys, "show", write(change), f"model.path={model_folder}")
    assert re.search(f"odd: {line}", shown)


def test_a_template_that_opens_the_thought_is_told(write, model_folder, capsys, tmp_path):
    processor = load_processor(str(model_folder))
    processor.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    load_model(model_folder, tmp_path / "thinker", processor)
    _, shown = run(capsys, "show", write({}), f"model.path={tmp_path}/thinker")
    assert "odd: the chat template opens <think> itself" in shown


def load_model(source: Path, target: Path, processor):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    processor.save_pretrained(target)


def test_the_page_holds_its_images_and_escapes_what_it_shows(write, model_folder, capsys, tmp_path):
    path = write({"problem": "<image><b>bold</b> [red]markup[/red]"}, {})
    page = tmp_path / "page.html"
    code, shown = run(capsys, "show", path, f"model.path={model_folder}", "--count", 2, "--html", page)
    assert code == 0
    assert "<b>bold</b> [red]markup[/red]" in shown
    text = page.read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert text.count("data:image/png;base64,") == 2
    assert "<mark>&lt;|im_start|&gt;</mark>" in text
    assert "http" not in text


def test_a_row_that_is_not_there_is_refused(write, capsys):
    assert run(capsys, "show", write({}), "--row", 3) == (
        2,
        f"vogue data: --row 3: {write({})} has no such row; they go from 0 to 0",
    )


# ------------------------------------------------------------------------------------------------------------- check


def test_all_that_cannot_be_used_is_found_and_left_out(write, model_folder, config, capsys, tmp_path):
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:-30])
    long = {"problem": "<image>" + "How many? " * 100}
    path = write({}, {"images": ["cut.png"]}, {"images": ["gone.png"]}, {"answer": None}, long, {})
    model = (f"model.path={model_folder}", "data.max_prompt_tokens=256")
    code, shown = run(capsys, "check", path, *model, "--out", tmp_path / "skip.txt")
    assert code == 1
    assert "4 of 6 can't be used" in shown
    lines = (tmp_path / "skip.txt").read_text().splitlines()
    assert [line.split("  #")[0] for line in lines] == ["1", "2", "3", "4"]
    assert "cut.png" in lines[0]
    assert "more than data.max_prompt_tokens=256" in lines[3]
    code, shown = run(capsys, "check", path, *model, f"data.skip={tmp_path}/skip.txt")
    assert (code, shown.endswith("all 2 samples can be used")) == (0, True)
    code, shown = run(capsys, "check", path)
    assert (code, "3 of 6 can't be used" in shown) == (1, True)


def test_rows_that_cannot_be_used_are_all_told_at_once(write, preprocessor):
    path = write(*[{"answer": None}] * 25, {})
    with pytest.raises(DataError) as told:
        check_samples(load_samples(path), preprocessor.lengths)
    lines = str(told.value).splitlines()
    assert lines[0] == "25 samples cannot be used:"
    assert len(lines) == 22
    assert "row 19: 'answer' must be text" in lines[20]
    assert lines[21].strip() == "and 5 more"


def test_an_image_of_a_shape_that_the_model_refuses_is_named_with_its_size(write, preprocessor, tmp_path):
    Image.new("RGB", (4096, 18)).save(tmp_path / "long.png")
    samples = load_samples(write({"problem": "<image><image>?", "images": ["red.png", "long.png"]}))
    message = r"rows.json, row 0: image 2 of 2 \(.*long.png\) of 4096 x 18 pixels: the model's processor says: .*ratio"
    with pytest.raises(DataError, match=message):
        check_samples(samples, preprocessor.lengths)


def test_prompts_that_are_too_long_are_refused_or_left_out_and_counted(write, processor):
    short, long = {}, {"problem": "<image>" + "How many? " * 30}
    samples, preprocessor = load_samples(write(short, long, short)), Preprocessor(processor, "", 128)
    with pytest.raises(DataError, match=r"row 1: the prompt has \d+ tokens .* more than data.max_prompt_tokens=128"):
        check_samples(samples, preprocessor.lengths)
    told = []
    checked = check_samples(samples, preprocessor.lengths, drop_overlong=True, tell=told.append)
    assert [sample.place[-5:] for sample in checked.samples] == ["row 0", "row 2"]
    assert told == ["1 of 3 samples are left out, since their prompts are too long"]
    with pytest.raises(DataError, match="no samples are left: all 1 prompts are too long"):
        check_samples(samples.at([1]), preprocessor.lengths, drop_overlong=True)


def test_ranks_share_the_looking_and_find_the_same(processor):
    preprocessor = Preprocessor(processor, "", 512)
    samples = [Sample(f"How many {n}?", "3", ()) for n in range(600)]
    alone = check_samples(samples, preprocessor.lengths)
    parts = {}

    def gather(rank):
        def given(mine):
            parts[rank] = mine
            return [parts[r] for r in sorted(parts)]

        return given

    for rank in range(2):
        shared = check_samples(samples, preprocessor.lengths, gather=gather(rank), rank=rank, ranks=2)
    assert [len(part) for part in parts.values()] == [2, 1]  # of three chunks of 256
    assert shared == alone


def test_the_fingerprint_tells_another_order_and_other_rows(write, preprocessor):
    def fingerprint(*changes):
        return check_samples(load_samples(write(*changes)), preprocessor.lengths).fingerprint

    a, b = {"answer": "1"}, {"answer": "2"}
    assert fingerprint(a, b) == fingerprint(a, b)
    assert len({fingerprint(a, b), fingerprint(b, a), fingerprint(a), fingerprint(a, b, b)}) == 4


# -------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>"])
def test_a_question_cannot_end_its_own_turn(processor, preprocessor, token):
    tokenizer = preprocessor.tokenizer
    sample = Sample(f"<image>What is {token} here?", "3", (RED,))
    view = preprocessor.view(preprocessor.images(sample))
    ids = preprocessor.prompt(sample, view).token_ids.tolist()
    plain = preprocessor.prompt(Sample("<image>What is  here?", "3", (RED,)), view).token_ids.tolist()
    special = tokenizer.convert_tokens_to_ids(token)
    assert ids.count(special) == plain.count(special)
    assert f"What is {token} here?" in tokenizer.decode(ids)
    assert preprocessor.lengths([sample]) == [len(ids)]


def test_a_rows_own_system_message_is_used_unless_one_is_set(processor):
    sample = Sample("How many?", "3", (), system="Be <|im_end|> brief.")
    own = Preprocessor(processor, "Think.", 512, own_system=True)
    assert "Be " in own.text(sample)
    assert own.tokenizer.decode(own.prompt(sample, own.view(())).token_ids).count("<|im_end|>") == 3
    assert "Think." in own.text(Sample("How many?", "3", ()))
    assert "Think." in Preprocessor(processor, "Think.", 512).text(sample)


def test_prompts_made_at_the_same_time_are_those_made_one_by_one(preprocessor):
    samples = [Sample("How many <|im_end|>?" * (i % 2) + f"And {i}?", "3", ()) for i in range(400)]

    def ids(sample):
        return preprocessor.prompt(sample, preprocessor.view(())).token_ids.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ids, samples)) == [ids(sample) for sample in samples]


# --------------------------------------------------------------------------------------------------------------- run


def test_a_run_is_told_of_test_samples_that_it_trains_on(config, digits_folder, capsys):
    from vogue.run.training import load_data

    chosen = config("trainer.eval_every=1", f"data.test={digits_folder}/train.parquet", "data.test_limit=5")
    load_data(chosen, Preprocessor.of(chosen))
    assert "warning: 5 of 5 samples of data.test are in data.train too" in capsys.readouterr().out


def test_pictures_of_one_length_under_one_question_are_told_apart(config, tmp_path, capsys):
    from vogue.run.training import load_data

    pictures = [Image.new("RGB", (56, 56), (shade, 0, 0)) for shade in (40, 41)]
    for name, picture in zip(("train", "test"), pictures, strict=True):
        write_parquet([Sample("<image>How dark?", "4", (picture,))], tmp_path / f"{name}.parquet")
    cells = [
        pyarrow.parquet.read_table(tmp_path / f"{name}.parquet")["images"][0].as_py()[0]["bytes"]
        for name in ("train", "test")
    ]
    assert len(cells[0]) == len(cells[1]) and cells[0] != cells[1]
    files = (f"data.train={tmp_path}/train.parquet", f"data.test={tmp_path}/test.parquet")
    chosen = config("trainer.eval_every=1", *files)
    load_data(chosen, Preprocessor.of(chosen))
    assert "are in data.train too" not in capsys.readouterr().out


def test_a_run_says_that_images_were_not_looked_at_until_they_were(settings, digits_folder, capsys, config):
    from vogue.run.training import load_data

    chosen = config()
    load_data(chosen, Preprocessor.of(chosen))
    assert "`vogue data check` finds broken ones before" in " ".join(capsys.readouterr().out.split())
    assert run(capsys, "check", f"{digits_folder}/train.parquet")[0] == 0
    load_data(chosen, Preprocessor.of(chosen))
    assert capsys.readouterr().out == ""


def test_a_run_is_not_resumed_on_other_data(settings, tmp_path, capsys, digits_folder):
    samples = list(load_samples(digits_folder / "train.parquet"))
    write_parquet(samples, tmp_path / "train.parquet")
    mine = [*settings, f"data.train={tmp_path}/train.parquet", "method=grpo", "trainer.steps=1"]
    assert main(["train", *mine]) == 0
    write_parquet(samples[::-1], tmp_path / "train.parquet")
    capsys.readouterr()
    assert main(["train", *mine[:-1], "trainer.steps=2", "--resume"]) == 2
    assert "train.parquet isn't what the run in" in capsys.readouterr().err
    write_parquet(samples, tmp_path / "train.parquet")
    assert main(["train", *mine[:-1], "trainer.steps=2", "--resume"]) == 0


def test_a_broken_image_is_skipped_and_counted_or_ends_the_run_with_its_row(settings, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    with open(tmp_path / "photos.csv", "w") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "image", "answer"])
        for n in range(4):
            RED.save(tmp_path / "photos" / f"{n}.png")
            rows.writerow(["How many?", f"photos/{n}.png", "3"])
    broken = tmp_path / "photos" / "2.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    mine = [*settings, f"data.train={tmp_path}/photos.csv", "trainer.steps=1"]
    assert main(["train", *mine]) == 2
    assert re.search(r"photos.csv, row 2: image 1 of 1 \(.*2.png\) cannot be read", capsys.readouterr().err)
    folder = tmp_path / "skipped"
    assert main(["train", *mine, "data.broken=skip", f"trainer.output_dir={folder}"]) == 0
    (row,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert row["broken_share"] == 1 / 4
