"""Makes torch's companion packages agree with the torch that is installed; run by `make setup`.

torchvision, torchaudio and torchcodec from the package index are CUDA builds. Beside a CPU build
of torch their compiled parts don't load, and transformers and vLLM import all three when they are
present:

  torchvision  fails with "operator torchvision::nms does not exist", though nothing here needs that
               operator. Declaring its schema before torchvision is imported cures it, in every
               process of the environment, hence an import hook in site-packages.
  torchaudio, torchcodec
               have no part that works without their library, and both importers do without them:
               they are uninstalled.

Where the builds match, nothing is left behind, not even a hook from the time when they didn't.
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''\
"""Declares two operators that a CUDA build of torchvision can't load beside a CPU build of torch."""

import sys


class DeclareOperators:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(DeclareOperators)
            import torch

            global library  # the declarations live as long as this object
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators)
'''


def failure(package):
    """Why `import package` fails beside this torch: its last line, or None if it doesn't fail."""
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, {package}"], capture_output=True, text=True, timeout=300
    )
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else None


def remove_hook(site_packages):
    for path in Path(site_packages).glob("vogue_torchvision_hook.*"):
        path.unlink()


def install_hook(site_packages):
    """Every Python process of an environment runs the `import` lines of its .pth files."""
    (Path(site_packages) / "vogue_torchvision_hook.py").write_text(HOOK)
    (Path(site_packages) / "vogue_torchvision_hook.pth").write_text("import vogue_torchvision_hook\n")


def installed(package):
    return importlib.util.find_spec(package) is not None


def main(site_packages):
    did = []
    remove_hook(site_packages)
    why = failure("torchvision") if installed("torchvision") else None
    if why and "operator torchvision::nms does not exist" in why:
        install_hook(site_packages)
        did.append("an import hook declares torchvision's missing operators")
        why = failure("torchvision")
    if why:
        sys.exit(f"match_torch: torchvision can't be imported: {why}")

    # OSError is the loader's. ImportError and RuntimeError (no ffmpeg, say) importers expect and handle.
    unusable = [
        package
        for package in ("torchaudio", "torchcodec")
        if installed(package) and (failure(package) or "").startswith("OSError")
    ]
    if unusable:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *unusable], check=True)
        did.append(f"removed {' and '.join(unusable)}, whose libraries this torch can't load")
    print("match_torch: " + ("; ".join(did) or "torch and its companions match, nothing to do"))


if __name__ == "__main__":
    main(sysconfig.get_path("purelib"))
