"""Videos: which frames are taken, how a prompt holds them, and what the policy, its engines and T(x) make of them."""

import copy
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from kinds import processor_of
from PIL import Image
from ranks import launch

from vogue.cli import main
from vogue.data import DataError, Sample, load_samples, write_parquet
from vogue.data.moving_digits import moving_pairs, write_moving_digits
from vogue.data.samples import VIDEO
from vogue.data.videos import Clip, Frames, VideoLimits, load, outline, strip
from vogue.families import QWEN2_5, QWEN3
from vogue.inputs import Preprocessor
from vogue.model.packing import Row, collate
from vogue.model.policy import Policy
from vogue.rollout.engine import Completion
from vogue.step.loader import perturbed


def grey(value, size=(56, 28)):
    return Image.new("RGB", size, (value,) * 3)


def frames(count, fps=None, size=(56, 28)):
    return Frames(tuple(grey(20 * i, size) for i in range(count)), fps)


def noise(count, size=(56, 28), seed=0):
    random = np.random.default_rng(seed)
    pixels = [Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]
    return Frames(tuple(pixels), 2.0)


# ------------------------------------------------------------------------------------------------------- frames


def test_frames_are_taken_evenly_at_the_asked_rate_by_hand():
    # 10 frames at 5 a second are 2 seconds: 4 frames at 2 a second, 0.5 seconds apart in the mean.
    clip = load(frames(10, 5.0), VideoLimits(fps=2.0))
    assert [frame.getpixel((0, 0))[0] for frame in clip.frames] == [0, 60, 120, 180]
    assert clip.times == pytest.approx((0, 0.6, 1.2, 1.8))
    assert clip.interval == 0.5
    few = load(frames(10, 5.0), VideoLimits(fps=2.0, max_frames=3))
    assert [frame.getpixel((0, 0))[0] for frame in few.frames] == [0, 180]  # an even number of them
    assert [frame.getpixel((0, 0))[0] for frame in load(frames(1), VideoLimits()).frames] == [0, 0]
    assert len(load(frames(6), VideoLimits(fps=7.0)).frames) == 6  # without a rate of its own all are taken


@pytest.mark.parametrize(("count", "fps"), [(10, 5.0), (7, None), (1, 1.0)])
def test_an_outline_is_what_is_loaded(count, fps):
    limits = VideoLimits(fps=2.0, pixels=VideoLimits().pixels._replace(most=500))
    clip, told = load(frames(count, fps), limits), outline(frames(count, fps), limits)
    assert (told.times, told.interval, told.size) == (clip.times, clip.interval, clip.frames[0].size)
    assert clip.frames[0].width * clip.frames[0].height <= 500


def test_a_file_is_decoded_and_its_outline_told():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for i in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(grey(20 * i, (64, 32)))))
        container.mux(stream.encode())
    content, limits = file.getvalue(), VideoLimits(fps=2.0)
    clip, told = load(content, limits), outline(content, limits)
    assert [frame.getpixel((9, 9))[0] for frame in clip.frames] == pytest.approx([0, 60, 120, 180], abs=6)
    assert (told.times, told.interval, told.size) == (clip.times, clip.interval, (64, 32))
    assert clip.times == pytest.approx((0, 0.6, 1.2, 1.8))
    with pytest.raises(DataError, match=r"sample: video 1 of 1 \(9 bytes\) cannot be read"):
        Sample("What?", "a", (), videos=(b"no video!",)).load_videos(limits)


def test_without_a_decoder_a_file_is_refused_by_the_extras_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DataError, match="decoding a video needs PyAV: pip install 'av"):
        Sample("What?", "a", (), videos=(b"no video!",)).load_videos(VideoLimits())


def test_frames_of_several_sizes_are_refused():
    uneven = Frames((grey(0), grey(0, (28, 28))))
    with pytest.raises(DataError, match="its frames are of several sizes: 28 x 28, 56 x 28"):
        Sample("What?", "a", (), videos=(uneven,)).load_videos(VideoLimits())


# ------------------------------------------------------------------------------------------------------- samples


def read(folder, *rows):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return load_samples(path)


def test_a_column_and_parts_of_messages_hold_videos(tmp_path):
    for i in range(3):
        grey(i).save(tmp_path / f"{i}.png")
    names = [f"{i}.png" for i in range(3)]
    column = {"problem": "Which?", "answer": "a", "videos": [names], "image": "0.png"}
    part = {"type": "video", "video": names, "fps": 4.0}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}]
    (first,) = read(tmp_path, column)
    assert (first.problem, len(first.images), len(first.videos)) == ("Which?", 1, 1)
    assert [frame.size for frame in first.load_videos(VideoLimits(fps=9.0))[0].frames] == [(56, 28)] * 2
    (second,) = read(tmp_path, {"messages": messages, "answer": "a"})
    assert second.problem == f"{VIDEO}Which?"
    assert second.videos[0].fps == 4.0
    (third,) = read(tmp_path, column | {"problem": f"In {VIDEO}?"})
    assert third.problem == f"<image>In {VIDEO}?"
    with pytest.raises(DataError, match="the problem has 2 <video> but the row has 1 video"):
        read(tmp_path, column | {"problem": VIDEO * 2})[0]
    with pytest.raises(DataError, match="a video must be a file's path, encoded bytes, or a list of images"):
        read(tmp_path, column | {"videos": [{"name": "a"}]})[0]


def test_written_videos_are_read_back(tmp_path):
    sample = Sample("Which?", "a", (grey(9),), videos=(frames(3, 4.0),))
    write_parquet([sample, Sample("How many?", "3", ())], tmp_path / "a.parquet")
    first, second = load_samples(tmp_path / "a.parquet")
    assert second.videos == ()
    (clip,), (before,) = first.load_videos(VideoLimits(fps=4.0)), sample.load_videos(VideoLimits(fps=4.0))
    assert [x.tobytes() for x in clip.frames] == [x.tobytes() for x in before.frames]
    assert clip.times == before.times
    assert first.digest() != replace(first, videos=()).digest()


def test_two_digits_cross_the_picture_one_after_the_other():
    pairs = moving_pairs("test", 40, seed=0)
    assert {pair.question for pair in pairs} == {"first", "second", "sum", "way"}
    for pair in pairs:
        assert len(pair.frames) == 4
        ink = [255 - np.asarray(frame.convert("L"), dtype=float) for frame in pair.frames]
        places = [(x.sum(0) * np.arange(56)).sum() / x.sum() for x in ink]
        assert (places[0] < places[1]) == (pair.ways[0] == "right")
        assert (places[2] < places[3]) == (pair.ways[1] == "right")
        right = {"first": pair.first, "second": pair.second, "sum": pair.first + pair.second, "way": pair.ways[0]}
        assert pair.sample().answer == str(right[pair.question])
    again = moving_pairs("test", 40, seed=0)
    assert [p.frames[2].tobytes() for p in pairs] == [p.frames[2].tobytes() for p in again]
    with pytest.raises(DataError, match="6 frames: their number must be a multiple of 4"):
        moving_pairs("test", 1, seed=0, frames=6)


@pytest.fixture(scope="module")
def moving_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    write_moving_digits(folder, 12, 2, 2)
    return folder


def test_videos_are_shown_and_checked(moving_folder, model_folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    data, model = f"{moving_folder}/train.parquet", f"model.path={model_folder}"
    assert main(["data", "show", data, model, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "video 1: 4 frames of 56 x 28 pixels, from 0.0 to 1.5 seconds, 4 tokens" in printed
    assert "0 of them of images and 4 of videos" in " ".join(printed.split())
    assert page.read_text().count("data:image/png;base64,") == 1
    assert main(["data", "check", data, model]) == 0
    assert strip(load(frames(6), VideoLimits())).size == (4 * 56 + 3 * 2, 28)


# ------------------------------------------------------------------------------------------------------- prompts


def of_family(processor, kind):
    if kind == "qwen2_5_vl":
        return processor
    return processor_of(kind, copy.deepcopy(processor.tokenizer), processor.chat_template)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_prompt_is_what_the_models_own_processor_makes(processor, kind):
    own = of_family(processor, kind)
    preprocessor = Preprocessor(own, "Think.", 512)
    sample = Sample(f"Is <image> in {VIDEO} or {VIDEO}?", "no", (grey(3),), videos=(noise(4), noise(6, (84, 56))))
    view = preprocessor.raw_view(sample)
    prompt = preprocessor.prompt(sample, view)
    videos = [np.stack([np.asarray(frame).transpose(2, 0, 1) for frame in clip.frames]) for clip in view.clips]
    told = [
        {"fps": 2.0, "total_num_frames": len(v), "frames_indices": list(range(len(v))), "duration": len(v) / 2}
        for v in videos
    ]
    text = preprocessor.text(sample)  # without what stands between frames, which the processor puts there
    theirs = own(
        text=[text], images=[[grey(3)]], videos=videos, video_metadata=told, do_sample_frames=False, return_tensors="pt"
    )
    assert prompt.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(view.video_pixel_values, theirs["pixel_values_videos"])
    assert torch.equal(view.video_sizes, theirs["video_grid_thw"])
    assert prompt.token_types.tolist() == theirs["mm_token_type_ids"][0].tolist()
    assert preprocessor.lengths([sample]) == [len(prompt.token_ids)]
    for runs, grid in zip(prompt.video_spans, view.video_sizes.tolist(), strict=True):
        assert sum(count for _, count in runs) == np.prod(grid) // 4
        assert len(runs) == (1 if kind == "qwen2_5_vl" else grid[0])
        for first, count in runs:
            assert (prompt.token_types[first : first + count] == 2).all()
    if kind == "qwen2_5_vl":
        assert theirs["second_per_grid_ts"].tolist() == [clip.interval * 2 for clip in view.clips]


def test_positions_of_a_videos_tokens_by_hand(processor, new_model):
    # Text; a video of 2 x 1 x 2 tokens, whose places in time are 0.5 s x 2 frames x 4 a second = 4 apart; text; image.
    model = new_model()
    model.config.vision_config.tokens_per_second = 4
    types = torch.tensor([[0, 0, 2, 2, 2, 2, 0, 1, 1, 0]])
    real = torch.ones_like(types)
    image, video = torch.tensor([[1, 2, 4]]), torch.tensor([[2, 2, 4]])
    found = QWEN2_5.positions(model, types, types, real, image, video, [0.5])
    assert found[:, 0].tolist() == [
        [0, 1, 2, 2, 6, 6, 7, 8, 8, 10],
        [0, 1, 2, 2, 2, 2, 7, 8, 8, 10],
        [0, 1, 2, 3, 2, 3, 7, 8, 9, 10],
    ]
    # With times in text, as Qwen3-VL has them, each two frames are a picture of their own.
    types = torch.tensor([[0, 2, 2, 0, 2, 2, 0]])
    found = QWEN3.positions(model, types, types, torch.ones_like(types), None, video, [0.5])
    assert found[:, 0].tolist() == [[0, 1, 1, 3, 4, 4, 6], [0, 1, 1, 3, 4, 4, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_a_family_without_videos_says_so(processor):
    own = processor_of("internvl", copy.deepcopy(processor.tokenizer), processor.chat_template)
    (error,) = Preprocessor(own, "", 512).lengths([Sample("What?", "a", (), videos=(frames(4),), place="a, row 3")])
    assert str(error).startswith(
        "a, row 3: it has a video, and prompts of InternVLProcessor are made with images alone"
    )


def test_a_video_that_is_too_long_is_told_by_what_makes_it_shorter(preprocessor):
    sample = Sample("What?", "a", (), videos=(noise(40, (280, 280)),))
    (error,) = preprocessor.lengths([sample])
    assert "2000 of videos), more than data.max_prompt_tokens=512; lower data.video_fps" in str(error)


def test_every_frame_is_perturbed_alike():
    same = Clip((grey(90), grey(90), grey(130)), (0.0, 0.5, 1.0), 0.5)
    found = perturbed(same, 3, {"preset": "noise", "sigma": 0.1})
    first, second, third = (np.asarray(frame, dtype=int) for frame in found.frames)
    assert (first == second).all()
    inside = (first > 0) & (third < 255)
    assert np.abs((third - first)[inside] - 40).max() <= 1  # the same noise on both
    assert (first != np.asarray(perturbed(same, 4, {"preset": "noise", "sigma": 0.1}).frames[0])).any()


# ----------------------------------------------------------------------------------------- in the policy and a run


def completion(*ids):
    return Completion(ids, (0.0,) * len(ids), "", True)


def test_images_and_videos_mix_in_a_batch_and_in_a_sample(preprocessor, new_model, monkeypatch):
    """Rows that share a prompt, of a video, of an image and a video, of an image, and of text: each as alone."""
    model = new_model()
    model.config.vision_config.tokens_per_second = 2
    samples = [
        Sample("Which?", "a", (), videos=(noise(4, seed=1),)),
        Sample(f"Is <image> in {VIDEO} or {VIDEO}?", "a", (grey(9),), videos=(noise(6, seed=2), noise(4, (84, 56)))),
        Sample("Which?", "a", (grey(200),)),
        Sample("Which?", "a", ()),
    ]
    completions = (completion(70, 71, 72), completion(80, 81))
    rows, expected = [], []
    for sample in samples:
        view = preprocessor.raw_view(sample)
        prompt = preprocessor.prompt(sample, view)
        rows.append(Row(prompt, {"raw": view}, "raw", completions, tuple(torch.zeros(3 - i) for i in range(2))))
        for one in completions:
            ids = torch.cat([prompt.token_ids, torch.tensor(one.token_ids)])[None]
            types = torch.cat([prompt.token_types, torch.zeros(len(one.token_ids), dtype=torch.long)])[None]
            seconds = [clip.interval for clip in view.clips]
            where = QWEN2_5.positions(model, ids, types, torch.ones_like(ids), view.sizes, view.video_sizes, seconds)
            given = {"pixel_values": view.pixel_values, "image_grid_thw": view.sizes}
            given |= {"pixel_values_videos": view.video_pixel_values, "video_grid_thw": view.video_sizes}
            given = {name: tensor for name, tensor in given.items() if tensor is not None}
            with torch.no_grad():
                logits = model(input_ids=ids, position_ids=where, mm_token_type_ids=types, **given).logits[0].float()
            start = len(prompt.token_ids) - 1
            logp = logits[start:-1].log_softmax(-1)
            expected.append(logp[torch.arange(len(one.token_ids)), list(one.token_ids)])
    batch = collate(rows, preprocessor.tokenizer.pad_token_id, token_mean=True)
    policy = Policy(model, 1.0)
    with torch.no_grad():
        found = policy(batch).logprob
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=0)
    assert len({round(x, 3) for x in found.view(4, 5)[:, 0].tolist()}) == 4  # each sees something else
    own = model.model.forward

    def forward(pixel_values=None, pixel_values_videos=None, **inputs):  # that of transformers 5.17 takes no features
        inputs.pop("mm_encoder_outputs", None)
        return own(pixel_values=pixel_values, pixel_values_videos=pixel_values_videos, **inputs)

    monkeypatch.setattr(model.model, "forward", forward)
    with torch.no_grad():
        assert torch.equal(policy(batch).logprob, found)


@pytest.fixture
def mixed_videos(tmp_path):
    pairs = moving_pairs("train", 8, seed=0)
    samples = [pair.sample() for pair in pairs]
    samples[1] = Sample("What is 1 + 1?", "2", ())
    samples[2] = Sample("<image>Which digit?", "3", (pairs[2].frames[0],))
    samples[3] = replace(samples[3], problem="<image>" + samples[3].problem, images=(pairs[3].frames[1],))
    write_parquet(samples, tmp_path / "mixed.parquet")
    return tmp_path / "mixed.parquet"


def trained(settings, folder, *more, ranks=1):
    given = [*settings, "rollout.prompts=8", "rollout.n=4", "branch.rollout=raw", "branch.probability=1"]
    given += ["trainer.measure_every=1", f"trainer.output_dir={folder}", *more]
    if ranks == 1:
        assert main(["train", *given]) == 0
    else:
        launch(ranks, "--module", "vogue.train", *given)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_trains_on_videos_images_and_text(settings, mixed_videos, tmp_path):
    (row,) = trained(settings, tmp_path / "run", f"data.train={mixed_videos}", "trainer.steps=1")
    assert row["ratio_error"] < 1e-4
    assert row["mismatch/logprob"] < 1e-4
    assert row["measured/u_per"] > 0
    records = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert any("<video>" in record["problem"] for record in records)
    for record in records:
        count = record["problem"].count("<video>") + record["problem"].count("<image>")
        assert len(record["image"]) == len(record["perturbed"]) == count
        for path in record["image"]:
            assert Image.open(tmp_path / "run" / path).height == 28


@pytest.mark.long
def test_two_ranks_train_on_videos_as_one(settings, mixed_videos, tmp_path):
    more = f"data.train={mixed_videos}", "trainer.steps=2"
    one = trained(settings, tmp_path / "one", *more)
    two = trained(settings, tmp_path / "two", *more, ranks=2)
    for a, b in zip(one, two, strict=True):
        for name in ("reward", "loss", "grad_norm", "entropy", "u_per", "tokens"):
            assert b[name] == pytest.approx(a[name], rel=1e-3)
