"""Programs that stand in for what a sweep starts, where training would take long: the launcher and the analysis."""

import json
import sys
from pathlib import Path

import pytest

from flame import sweep

# Trains nothing: says that it runs, takes a moment, and leaves a finished run. An arm called "fails" fails as long as a
# file `mended` is not there; one called "waits" runs until SIGTERM.
LAUNCHER = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
folder, log = Path(flags["job.dump_folder"]), Path({log!r})
arm, steps = folder.parent.name, int(flags["training.steps"])
def say(what):
    names = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NGPU")
    line = dict(what=what, run=f"{{arm}}/{{folder.name}}", pid=os.getpid(), env={{x: os.environ.get(x) for x in names}})
    with log.open("a") as file:
        file.write(json.dumps(line) + chr(10))
def stop(number, frame):
    say(signal.Signals(number).name)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
say("start")
if arm == "fails" and not Path({mended!r}).exists():
    print("flame: error: something is wrong with it")
    sys.exit(1)
while arm == "waits":
    time.sleep(0.05)
time.sleep(0.3)
folder.mkdir(parents=True, exist_ok=True)
seed, rate = int(flags["training.seed"]), float(flags["optimizer.lr"])
loss = dict(softmax=2.0).get(arm, 2.5) + seed / 10 + abs(rate - 0.002)
metrics = [dict(step=1, time=100.0, loss=5.0), dict(step=steps, time=100.0 + steps - 1, loss=loss)]
metrics.append(dict(step=steps, time=200.0, validation_loss=loss))
(folder / "metrics.jsonl").write_text("".join(json.dumps(x) + chr(10) for x in metrics))
(folder / "hf").mkdir(exist_ok=True)
(folder / "hf" / "config.json").write_text("{{}}")
say("end")
"""

ANALYZER = """
import json, sys
from pathlib import Path
argv = sys.argv[1:]
out = Path(argv[argv.index("--out") + 1])
# as the analysis does
if out.is_dir() and any(out.iterdir()) and not (out / "records.jsonl").is_file():
    sys.exit("flame: error: --out holds files of others")
if Path({broken!r}).exists():
    sys.exit("flame: error: no analysis today")
out.mkdir(parents=True, exist_ok=True)
with (out / "records.jsonl").open("a") as file:
    file.write(json.dumps(argv) + chr(10))
"""


def write(folder: Path) -> tuple[list[str], list[str]]:
    """The commands in the place of `flame.launch` and `flame.analyze`; both write into ``folder``."""
    launcher, analyzer = folder / "launcher.py", folder / "analyzer.py"
    log, mended, broken = (str(folder / name) for name in ("log", "mended", "broken"))
    launcher.write_text(LAUNCHER.format(log=log, mended=mended))
    analyzer.write_text(ANALYZER.format(broken=broken))
    return [sys.executable, str(launcher)], [sys.executable, str(analyzer)]


def said(folder):
    """The lines of the stand-ins' log, in the folder of `write`."""
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [json.loads(line) for line in lines]


def starts(folder):
    """Names of the runs that were started, in their order."""
    return [line["run"] for line in said(folder) if line["what"] == "start"]


def run_main(monkeypatch, file, *flags):
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["flame.sweep", str(file), *flags])
    with pytest.raises(SystemExit) as end:
        sweep.main()
    return end.value.code
