"""`vogue watch`: what is read of a run that goes on, and what a terminal and a browser show of it."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console
from written_runs import change, write_run

from vogue.cli import main
from vogue.run.folder import LOCK, parts, rotate
from vogue.settings import ConfigError
from vogue.watch.following import Follower, Log, latest_rows
from vogue.watch.server import Server
from vogue.watch.terminal import printable, sparkline, view


def append(path, *records):
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def steps(rows):
    return [row["step"] for row in rows]


def shown(seen, width=100, height=None):
    console = Console(width=width, height=height or 200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view(seen, width, height))
    return console.export_text()


# ------------------------------------------------------------------------------------------------ what is read


def test_a_log_is_read_on_from_where_it_was_also_where_it_is_put_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    assert log.read() == []
    append(path, {"step": 0}, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "rew')
    assert steps(log.read()) == [0, 1]
    with open(path, "a") as file:
        file.write('ard": 1.0}\n')
    assert steps(log.read()) == [0, 1, 2]
    rotate(path)
    assert steps(log.read()) == [0, 1, 2]
    append(path, {"step": 3})
    rotate(path)
    append(path, {"step": 4})
    assert [file.name for file in parts(path)] == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert steps(log.read()) == [0, 1, 2, 3, 4]


def test_a_run_that_is_resumed_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, *({"step": step, "reward": 0.0} for step in range(5)))
    log = Log(path)
    assert len(log.read()) == 5
    (tmp_path / "new").write_text('{"step": 0, "reward": 1.0}\n')
    (tmp_path / "new").rename(path)  # as a resumed run rewrites it
    assert log.read() == [{"step": 0, "reward": 1.0}]
    path.write_text("")
    assert log.read() == []


def test_a_broken_line_is_told_with_its_place(tmp_path):
    append(tmp_path / "metrics.jsonl", {"step": 0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("nonsense\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl, after byte 0: "):
        Log(tmp_path / "metrics.jsonl").read()


def test_the_latest_rows_are_found_at_the_end_of_large_logs_and_of_several(tmp_path):
    path = tmp_path / "completions.jsonl"
    for step in range(6):
        append(path, {"step": step, "completion": "x" * 700_000})
        if step in (1, 3):
            rotate(path)
    with open(path, "a") as file:
        file.write('{"step": 6')
    assert steps(latest_rows(path, 3)) == [3, 4, 5]
    assert steps(latest_rows(path, 100)) == [0, 1, 2, 3, 4, 5]


def test_whether_a_run_goes_on_is_read_from_its_lock(tmp_path):
    run = write_run(tmp_path / "run", "trainer.steps=20", steps=12, logged=1)
    lock = run / LOCK
    follower = Follower(run)
    assert (follower.look().state, follower.look().ended) == ("stopped", True)
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert (follower.look().state, follower.look().ended) == ("running", False)
    lock.write_text("process 1 on some-other-machine\n")
    assert (follower.look().state, follower.look().ended) == ("running", False)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock.write_text(f"process {ended.pid} on {socket.gethostname()}\n")
    assert (follower.look().state, follower.look().ended) == ("stopped", True)
    append(run / "metrics.jsonl", *({"step": step, "reward": 0.0} for step in range(12, 20)))
    assert follower.look().state == "finished"


def test_a_run_that_is_late_sets_off_the_alarm_unless_it_has_ended(tmp_path):
    run = write_run(tmp_path / "run", "trainer.steps=20", steps=12, logged=1)
    later = time.time() + 3600
    assert Follower(run, lambda: later).look().alarms == []
    (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    (alarm,) = Follower(run, lambda: later).look().alarms
    assert (alarm.name, alarm.first) == ("no step", 11)
    assert re.fullmatch(r"nothing for 1 h 00 min; a step takes 5\.\d+ s", alarm.text)
    os.utime(run / "evaluations.jsonl", (later, later))  # an evaluation has just ended
    assert Follower(run, lambda: later).look().alarms == []


# ------------------------------------------------------------------------------------------------ in a terminal


def test_without_a_terminal_it_is_shown_once_and_the_exit_code_says_whether_an_alarm_is_on(tmp_path, capsys):
    run = write_run(tmp_path / "run", logged=2)
    assert main(["watch", str(run)]) == 0
    out = capsys.readouterr().out
    assert "12 of 12 steps · finished" in out
    assert "no alarm" in out
    assert re.search(r"held-out pass@1 \d+\.\d% → \d+\.\d% \[.*\] after 12 steps", out)
    assert re.search(r"■ rollout \d+%", out)
    assert re.search(r"^reward +[▁-█]{12} ", out, re.MULTILINE)
    record = json.loads((run / "completions.jsonl").read_text().splitlines()[-1])
    assert f"step 11  reward {record['reward']:.3g}" in out
    change(run / "metrics.jsonl", lambda step, row: row | {"skipped_updates": float(step == 11)})
    assert main(["watch", str(run)]) == 1
    assert "● skipped updates (step 11): 100% of the step's updates" in capsys.readouterr().out


def test_a_folder_that_is_no_run_and_options_that_need_one_another_are_told(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert f"{tmp_path} is no run: it has no config.yaml" in capsys.readouterr().err
    run = write_run(tmp_path / "run", steps=2, logged=1)
    assert main(["watch", str(run), "--port", "7000"]) == 2
    assert "they go with --serve" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["watch", str(run), "--serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_run_before_its_first_step_is_shown(tmp_path):
    run = write_run(tmp_path / "run", steps=1, logged=0)
    for name in ("metrics", "completions", "evaluations"):
        (run / f"{name}.jsonl").unlink()
    (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert "0 of 1 steps · before its first step" in shown(Follower(run).look())
    with Server(Follower(run), port=0) as server:
        assert "before its first step: 0 of 1 steps" in server.page.now()[0].decode()


def test_a_small_terminal_has_the_numbers_and_a_larger_one_the_completions_too(tmp_path):
    seen = Follower(write_run(tmp_path / "run", logged=6)).look()
    assert "right answer" not in shown(seen, 80, 24)
    assert shown(seen, 80, 50).count("right answer") == 5
    assert all(len(line) <= 80 for line in shown(seen, 80, 50).splitlines())


def test_a_sparkline_has_the_means_between_lowest_and_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 2, 7, 7], 2) == "▁█"  # means 1 and 7
    assert sparkline([0.5] * 3, 8) == "▅▅▅"
    assert sparkline([1, float("nan"), 2], 8) == "▁ █"
    assert sparkline([], 8) == ""


def test_text_of_a_model_does_nothing_to_a_terminal(tmp_path):
    run = write_run(tmp_path / "run", steps=2, logged=1)
    hostile = "\x1b[2J\x1b]0;title\x07\x9b31m[red]a\u202eb"
    change(
        run / "completions.jsonl", lambda _, row: row | {"completion": hostile, "problem": hostile, "answer": hostile}
    )
    text = shown(Follower(run).look())
    assert printable(hostile) == " [2J ]0;title  31m[red]a b"
    assert " [2J ]0;title  31m[red]a b" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


@pytest.mark.slow
def test_a_terminal_is_kept_up_to_date_until_the_run_ends(tmp_path):
    run = write_run(tmp_path / "run", "trainer.steps=13", logged=1)
    (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "vogue", "watch", str(run)]
    told = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(command, stdout=end, stdin=end, stderr=end, env=os.environ | told)
    os.close(end)
    read = b""

    def until(text):
        nonlocal read
        while text not in read:
            read += os.read(terminal, 1 << 16)

    until(b"12 of 13 steps")
    append(run / "metrics.jsonl", {"step": 12, "reward": 0.0})
    until(b"13 of 13 steps")
    (run / LOCK).write_text("")
    until(b"finished")
    assert process.wait(timeout=20) == 0
    os.close(terminal)


# -------------------------------------------------------------------------------------------------- on a page


@pytest.fixture
def serving(tmp_path):
    """A run, and the server of its page."""
    run = write_run(tmp_path / "run", "trainer.steps=100", steps=12, logged=4)
    (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    with Server(Follower(run), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield run, server
        server.shutdown()
        thread.join()


def ask(server, path, **headers):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply, body


def test_the_page_is_for_this_machine_alone_and_has_nothing_but_itself_and_its_images(serving, tmp_path):
    run, server = serving
    assert server.server_address[0] == "127.0.0.1"
    reply, page = ask(server, "/")
    assert (reply.status, reply.headers["X-Content-Type-Options"]) == (200, "nosniff")
    assert b"default-src 'none'; img-src data: 'self'; connect-src 'self';" in page
    image = next((run / "completions").iterdir())
    reply, content = ask(server, f"/completions/{image.name}")
    assert (reply.status, reply.headers["Content-Type"], content) == (200, "image/webp", image.read_bytes())
    (tmp_path / "secret.webp").write_text("secret")
    for path in ("/config.yaml", "/completions/../config.yaml", "/completions/..%2f..%2fsecret.webp", "/completions/"):
        assert ask(server, path)[0].status == 404
    assert ask(server, "/completions/none.webp")[0].status == 404
    assert ask(server, "/", Host="evil.example:80")[0].status == 403  # a name that was pointed at this machine
    assert ask(server, "/", Host="localhost:1234")[0].status == 200


def test_the_page_is_sent_again_only_when_the_run_has_gone_on(serving):
    run, server = serving
    version = ask(server, "/")[0].headers["ETag"]
    assert ask(server, "/", If_None_Match=version)[0].status == 304
    append(run / "metrics.jsonl", {"step": 12, "reward": 0.7})
    reply, page = ask(server, "/", If_None_Match=version)
    assert (reply.status, b"13 of 100 steps" in page) == (200, True)
    with open(run / "metrics.jsonl", "a") as file:
        file.write("nonsense\n")
    reply, told = ask(server, "/")
    assert (reply.status, b"metrics.jsonl, after byte" in told) == (503, True)


def test_a_live_page_follows_the_run_and_leaves_the_reader_where_he_is(driver, serving):
    run, server = serving
    driver.get(server.address)
    driver.execute_script("window.kept = 1; window.scrollTo(0, 700)")

    def found(script):
        return driver.execute_script(f"return {script}")

    def wait_for(script):
        end = time.monotonic() + 15
        while not found(script):
            assert time.monotonic() < end, script
            time.sleep(0.1)

    assert found("document.getElementById('state').textContent") == "running: 12 of 100 steps"
    images = found("[...document.querySelectorAll('.pictures img')].map((image) => image.naturalWidth)")
    assert len(images) >= 20
    assert min(images) > 0
    assert found("document.querySelector('.chips').textContent").startswith(("✓", "✗"))
    driver.execute_script(
        "const field = document.querySelector('[name=result]'); field.value = 'right';"
        "field.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    place = "Math.round(document.getElementById('learning_curves').getBoundingClientRect().top)"
    where = found(place)
    curve = "document.querySelector('#learning_curves .curve').getAttribute('d')"
    before = found(curve)
    right = json.loads((run / "completions.jsonl").read_text().splitlines()[0]) | {"step": 12, "accuracy": 1.0}
    append(run / "completions.jsonl", right | {"problem": "the newest"}, right | {"problem": "wrong", "accuracy": 0.0})
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    append(run / "metrics.jsonl", row | {"step": 12, "skipped_updates": 1.0, "rounds": 2.0})
    wait_for("document.getElementById('state').textContent === 'running: 13 of 100 steps'")
    assert found(curve) != before
    assert "skipped updates step 12, until now" in " ".join(
        found("document.querySelector('.alarms .on').innerText").split()
    )
    wait_for("document.querySelector('.card .problem').textContent === 'the newest'")  # of the right ones the first
    kept = found(f"[document.querySelector('[name=result]').value, window.kept, {place}]")
    assert kept == ["right", 1, where]
    server.shutdown()
    server.server_close()
    wait_for("document.getElementById('state').textContent.includes('ended')")
    errors = [entry for entry in driver.get_log("browser") if "ERR_CONNECTION_REFUSED" not in entry["message"]]
    assert errors == []
