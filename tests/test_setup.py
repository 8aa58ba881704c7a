"""The set-up's own tools: tools/match_torch.py, the build of the C++ kernels and their own distribution."""

import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]

NMS = "RuntimeError: operator torchvision::nms does not exist"
NO_LIBRARY = "OSError: Could not load this library: libtorchcodec_image.so"


@pytest.fixture
def match_torch(monkeypatch, tmp_path):
    """The tool in a played environment, where `failures` maps a package to the last line of its import."""
    module = runpy.run_path(str(ROOT / "tools" / "match_torch.py"))
    tool = SimpleNamespace(commands=[], failures={}, hook=tmp_path / "vogue_torchvision_hook.pth")

    def failure(package):
        cured = package == "torchvision" and tool.failures.get(package) == NMS and tool.hook.exists()
        return None if cured else tool.failures.get(package)

    module["main"].__globals__.update(failure=failure, installed=lambda package: True)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: tool.commands.append(command[1:]))
    tool.main = lambda: module["main"](tmp_path)
    return tool


def test_matching_builds_are_left_alone(match_torch, capsys):
    match_torch.main()
    assert not match_torch.commands
    assert not match_torch.hook.exists()
    assert "nothing to do" in capsys.readouterr().out


def test_a_cuda_build_of_torchvision_gets_the_hook_and_keeps_it(match_torch, capsys):
    match_torch.failures["torchvision"] = NMS
    for _ in range(2):
        match_torch.main()
        assert match_torch.hook.exists()
        assert "import hook" in capsys.readouterr().out


def test_the_hook_goes_when_the_builds_match_again(match_torch):
    match_torch.failures["torchvision"] = NMS
    match_torch.main()
    match_torch.failures.clear()
    match_torch.main()
    assert not list(match_torch.hook.parent.iterdir())


def test_another_failure_of_torchvision_is_reported_not_hidden(match_torch):
    match_torch.failures["torchvision"] = "ImportError: libjpeg.so.8: cannot open shared object file"
    with pytest.raises(SystemExit, match=r"libjpeg\.so\.8"):
        match_torch.main()
    assert not match_torch.hook.exists()


def test_only_companions_whose_library_cannot_load_are_removed(match_torch):
    match_torch.failures |= {"torchcodec": NO_LIBRARY, "torchaudio": "RuntimeError: no ffmpeg"}
    match_torch.main()
    assert match_torch.commands == [["-m", "pip", "uninstall", "--quiet", "--yes", "torchcodec"]]


def test_the_hook_declares_both_operators_before_torchvision_is_imported(tmp_path):
    runpy.run_path(str(ROOT / "tools" / "match_torch.py"))["install_hook"](tmp_path)
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\nops = torch.ops.torchvision\nprint(ops.nms.default._schema, ops.qnms.default._schema)"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vogue_torchvision_hook, torchvision"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" in done.stdout
    assert "torchvision::qnms" in done.stdout


def test_the_version_is_that_of_the_installation_and_without_one_says_so():
    told = "import vogue; print(vogue.__version__)"
    found = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert found == metadata.version("vogue")
    bare = [sys.executable, "-S", "-c", told]  # without site-packages
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(bare, cwd=ROOT, env=environment, capture_output=True, text=True).stdout.strip()
    assert found == "0+not-installed"


def build(folder, prelude="pass", **environment):
    """`setup.py build_ext` in `folder`; returns the process and the library's path."""
    code = f"import runpy, sys; sys.argv = ['setup.py', '--quiet', 'build_ext', '-b', 'out']; {prelude}; " + (
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    return done, folder / "out" / "vogue_kernels" / "cpu" / "_C.so"


@pytest.fixture
def project(tmp_path):
    """A copy of what a build reads."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    copy_kernels(tmp_path)
    return tmp_path


def copy_kernels(folder):
    """kernels/ as a fresh checkout has it."""
    built = shutil.ignore_patterns("*.so", "build", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=built)


@pytest.mark.parametrize(
    "why, prelude, environment",
    [
        ("torch isn't visible", "sys.modules['torch'] = None", {}),
        ("cmake can't configure it", "pass", {"CXX": "/no/compiler"}),
        ("cmake isn't installed", "pass", {"PATH": ""}),
    ],
)
def test_where_the_kernels_cannot_be_built_the_installation_goes_on_and_says_why(project, why, prelude, environment):
    if "PATH" in environment:
        prelude = "sys.executable = '/nowhere/python'"  # beside which cmake is looked for first
    done, library = build(project, prelude, **environment)
    assert done.returncode == 0, done.stderr
    assert why in done.stderr
    assert not library.exists()


@pytest.mark.long  # by themselves they are, below; and so they were for whoever runs this
def test_the_kernels_are_built_where_there_is_a_compiler(project):
    done, library = build(project)
    assert done.returncode == 0, done.stderr
    code = f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.vogue_cpu.description())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split(",")[0].strip() in ("portable", "avx2", "avx512", "avx512_bf16"), done.stderr


def test_a_mistake_in_the_sources_is_an_error(project):
    for source in (project / "kernels" / "csrc").glob("*.cpp"):  # at its top: torch's headers take long to read
        source.write_text("#error broken")
    done, library = build(project)
    assert done.returncode != 0
    assert not library.exists()


ALONE = """
import sys
sys.path.insert(0, {site!r})
sys.modules["vogue"] = sys.modules["transformers"] = None  # importing them fails
import torch, vogue_kernels
stats = vogue_kernels.linear_logprob(torch.zeros(1, 4), torch.zeros(8, 4), torch.tensor([3]))
print(vogue_kernels.__file__, vogue_kernels.available_backends()["cpu"], stats.entropy.exp().item(), sep="\\n")
"""
NO_COMPILER = {"CXX": "/no/compiler"}
MISSING = "its library wasn't compiled: it needs a C++ compiler, and torch at hand (pip's --no-build-isolation)"


@pytest.mark.parametrize(
    "environment, why_not_cpu",
    [(NO_COMPILER, MISSING), pytest.param({}, "None", marks=pytest.mark.long)],
    ids=["without-a-compiler", "with-one"],
)
def test_the_kernels_are_installed_by_themselves(environment, why_not_cpu, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site]
    done = subprocess.run([*pip, copy_kernels(tmp_path)], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (distribution,) = metadata.distributions(path=[str(site)])
    assert distribution.metadata["Name"] == "vogue-kernels"
    assert {path.parts[0] for path in distribution.files} == {
        "vogue_kernels",
        f"vogue_kernels-{distribution.version}.dist-info",
    }
    done = subprocess.run([sys.executable, "-I", "-c", ALONE.format(site=str(site))], capture_output=True, text=True)
    file, why, choices = done.stdout.splitlines()
    assert file == str(site / "vogue_kernels" / "__init__.py")
    assert why == why_not_cpu
    assert ("vogue_kernels runs with PyTorch operators" in done.stderr) == (why != "None")  # one warning, or none
    assert float(choices) == pytest.approx(8)


def test_the_kernels_ask_for_the_same_packages_in_either_distribution():
    files = ROOT / "pyproject.toml", ROOT / "kernels" / "pyproject.toml"
    vogue, kernels = (tomllib.loads(file.read_text())["project"] for file in files)
    assert vogue["dependencies"] == kernels["dependencies"]
    assert not any("<" in package for package in kernels["dependencies"])  # a trainer's own pins decide
