"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

# workers run side by side, and threads of matrices this small wait for each other; before NumPy reads it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

HAS_GPU = torch.cuda.is_available()

# a script's background job ignores it, and so would the programs that tests stop with it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton_interpreter import repair

    repair()


def _keep_process():
    """Entry points that a test calls set up the program's logger, with a stream that ends with the test, and signals."""
    logger = logging.getLogger("flame")
    before = logger.handlers, logger.level, logger.propagate
    handlers = {s: signal.getsignal(s) for s in _SIGNALS}
    yield
    logger.handlers, logger.level, logger.propagate = before
    for number, handler in handlers.items():
        signal.signal(number, handler)


_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
# for fixtures of modules, which call entry points too, and for each test
_module_as_it_was = pytest.fixture(autouse=True, scope="module")(_keep_process)
_test_as_it_was = pytest.fixture(autouse=True)(_keep_process)


class _Deprecations(logging.Handler):
    """transformers says some of them through its logger, once a process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message or "will be removed" in message:
            self.found.append(message)


@pytest.fixture(autouse=True)
def _no_deprecated_calls():
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert handler.found == []


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


# files whose tests are each by themselves: any worker takes any of them
_COMPUTING = (
    "test_amd_arithmetic",
    "test_amd_data",
    "test_parallel",
    "test_decoding",
    "test_naive",
    "test_attention_stats",
    "test_compile",
    "test_data",
    "test_gluon",
    "test_hopper",
    "test_miniature_text",
    "test_rooms",
)
# files whose tests kill or stop processes, and say what comes of it within seconds: one worker takes all
_KILLING = (
    "test_checkpoints",
    "test_endings",
    "test_launch",
    "test_sweep_runs",
    "test_trainer",
)
# files whose tests let processes train to the end, however long that takes: another worker takes all
_TRAINING = (
    "test_arms_training",
    "test_context_parallel",
    "test_convert",
    "test_examples",
    "test_layouts",
    "test_lm_eval",
    "test_metrics",
    "test_packaging",
)


def _group(name: str) -> str | None:
    """Tests of one group run on one worker, one after another; so the tests of a file share its fixtures."""
    if name.startswith(_KILLING):
        return "killing"
    if name.startswith(_TRAINING):
        return "training"
    return None if name.startswith(_COMPUTING) else name


def pytest_addoption(parser):
    parser.addoption(
        "--hopper", action="store_true", help="use Hopper's kernels for all inputs that they take"
    )


def pytest_configure(config):
    if config.option.hopper:
        if not HAS_GPU or torch.cuda.get_device_capability() != (9, 0):
            raise pytest.UsageError("--hopper needs a GPU of architecture sm_90")
        from fla.ops.attn.softpick.kernel_choice import hopper_serving

        serving = ExitStack()
        serving.enter_context(hopper_serving("all"))
        config.add_cleanup(serving.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # xdist's own groups ("loadgroup") have no effect with pytest 9.2, whose node ids cannot be changed
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _group(Path(nodeid.partition("::")[0]).stem) or nodeid

    return Groups(config, log)


def pytest_collection_modifyitems(config, items):
    asked = config.option.markexpr
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        if item.get_closest_marker("slow") and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow, ask for it with -m slow"))
        if item.get_closest_marker("compile") and "compile" not in asked:
            item.add_marker(pytest.mark.skip(reason="takes minutes, ask for it with -m compile"))
