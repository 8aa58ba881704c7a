"""How long a run takes to know its data, and what it holds of it: images of a megapixel in one parquet file.

    python bench/data.py --model MODEL --images 30000 --folder /tmp/vogue-data     # 11 GB, and as much for the copy

Each line is of a process of its own: the first start, with the copy into the cache of `datasets`, and a later one.
Memory is the process's own (RssAnon) beyond what imports take; the mapped file counts as resident too, until the
system needs its pages for something else.
"""

import argparse
import io
import os
import subprocess
import sys
import time
from pathlib import Path

SIZE = (1024, 768)
ROWS = 500  # of a row group
LOOK = """
import time
from vogue.data import load_samples
from vogue.data.dataset import check_samples
from vogue.inputs import Preprocessor, load_processor
def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))
preprocessor = Preprocessor(load_processor({model!r}), "Think step by step.", 1 << 20)
import datasets
before, began = own(), time.perf_counter()
samples = load_samples({file!r})
opened = time.perf_counter()
checked = check_samples(samples, preprocessor.lengths)
done = time.perf_counter()
print(f"{{len(samples)}} samples: opened in {{opened - began:.1f}} s, looked at in {{done - opened:.1f}} s, "
      f"{{own() - before:.0f}} MB of its own memory")
"""


def write(path: Path, count: int) -> None:
    """Write `count` samples whose images are JPEGs of noise, of which no two are alike."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from vogue.data.samples import SCHEMA

    rng = np.random.default_rng(0)
    images = []
    for _ in range(16):
        buffer = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 255, (SIZE[1] // 6, SIZE[0] // 6, 3), dtype=np.uint8))
        small.resize(SIZE).save(buffer, "JPEG", quality=93)
        images.append(buffer.getvalue())
    with pq.ParquetWriter(path, SCHEMA) as file:
        for start in range(0, count, ROWS):
            rows = [
                {
                    "problem": f"<image>What is the number of this picture, {n}?",
                    "answer": str(n),
                    "images": [{"bytes": images[n % len(images)] + n.to_bytes(8, "little")}],
                }
                for n in range(start, min(start + ROWS, count))
            ]
            file.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model, whose processor is used")
    parser.add_argument("--images", type=int, default=5000, help="samples (default 5000: 2 GB)")
    parser.add_argument("--folder", type=Path, required=True, help="where the file and its copy are written, and left")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / f"{arguments.images}.parquet"
    if not file.exists():
        began = time.perf_counter()
        write(file, arguments.images)
        print(f"{file}: {file.stat().st_size / 1e9:.2f} GB, written in {time.perf_counter() - began:.0f} s", flush=True)
    environment = os.environ | {"HF_DATASETS_CACHE": str(arguments.folder / "cache")}
    for name in ("first start", "later start"):
        print(f"{name}: ", end="", flush=True)
        code = LOOK.format(model=arguments.model, file=str(file))
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)


if __name__ == "__main__":
    main()
