"""Fixtures for all tests: tiny data sets, made once a session."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

from tests.helpers import fast_config, tiny  # noqa: E402  after the threads are set

fast_config.install()


# Folders and files, below tests/, of what starts programs or trains for long: `make test-fast`
# skips them.
SLOW = (
    *("average", "cli", "convert", "distributed", "scripts", "sharpness", "sts"),
    *("examples/test_files.py", "examples/test_generation.py", "examples/test_glue_run.py"),
    *("examples/test_experiments.py", "examples/test_warm.py"),
    *("glue/test_predict.py", "glue/test_prepare.py", "squad/test_predict.py"),
    *("squad/test_training.py", "core/test_compiled_rounding.py", "test_conformance.py"),
    *("trainer/test_exit_paths.py", "trainer/test_half_precision.py"),
    *("trainer/test_weight_average.py", "trainer/test_cheaper_ascent.py", "test_fast_config.py"),
    *("checkpoints/test_mixed_data.py", "fairseq_patches/test_data_threads.py"),
    *("fairseq_patches/test_data_options.py", "pytorch/test_examples.py"),
    *("pytorch/test_ranks.py", "pytorch/test_without_fairseq.py"),
)


def pytest_collection_modifyitems(items):
    """Mark what is slow, and all of tests/cuda; skip what needs a GPU where there is none."""
    here = Path(__file__).parent
    slow = [here / name for name in SLOW]
    assert all(path.exists() for path in slow), slow
    for item in items:
        if any(path in (item.path, *item.path.parents) for path in slow):
            item.add_marker(pytest.mark.slow)
        if here / "cuda" in item.path.parents:
            item.add_marker(pytest.mark.cuda)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _half_precision_here() -> bool:
    """Whether torch has float16 on a CPU for what an encoder needs; from 2.2 on it has."""
    try:
        torch.nn.LayerNorm(2).half()(torch.zeros(1, 2).half())
    except RuntimeError:
        return False
    return True


HALF_PRECISION_HERE = _half_precision_here()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip what fails for no other reason than that torch < 2.2 lacks float16 on a CPU."""
    report = (yield).get_result()
    if report.failed and not HALF_PRECISION_HERE:
        if "not implemented for 'Half'" in str(call.excinfo.value):
            path, line, _ = item.location
            reason = f"Skipped: torch {torch.__version__} has no float16 layer norm on a CPU"
            report.outcome, report.longrepr = "skipped", (path, line, reason)


@pytest.fixture(scope="session")
def classification(tmp_path_factory):
    return tiny.write_classification(tmp_path_factory.mktemp("classification"))


@pytest.fixture(scope="session")
def language_modelling(tmp_path_factory):
    return tiny.write_language_modelling(tmp_path_factory.mktemp("language_modelling"))


@pytest.fixture(scope="session")
def translation(tmp_path_factory):
    return tiny.write_translation(tmp_path_factory.mktemp("translation"))


@pytest.fixture(scope="session")
def ranking(tmp_path_factory):
    return tiny.write_ranking(tmp_path_factory.mktemp("ranking"))


@pytest.fixture(scope="session")
def classification_and_teacher(classification):
    """The same data, with a teacher beside it."""
    tiny.write_teacher(classification, "sentence_prediction")
    return classification


@pytest.fixture(scope="session")
def translation_and_teacher(translation):
    """The same data, with a teacher beside it."""
    tiny.write_teacher(translation, "label_smoothed_cross_entropy")
    return translation


@pytest.fixture(scope="session")
def span_prediction(tmp_path_factory):
    return tiny.write_span_prediction(tmp_path_factory.mktemp("span_prediction"))


@pytest.fixture(scope="session")
def sentence_embedding(tmp_path_factory):
    return tiny.write_sentences(tmp_path_factory.mktemp("sentence_embedding"))


@pytest.fixture(scope="session")
def data_of(
    classification_and_teacher,
    language_modelling,
    translation_and_teacher,
    ranking,
    span_prediction,
    sentence_embedding,
):
    """Data directory of each criterion."""
    classification, translation = classification_and_teacher, translation_and_teacher
    return {
        **dict.fromkeys(tiny.SENTENCE_CRITERIONS, classification),
        "sentence_ranking": ranking,
        "span_prediction": span_prediction,
        **dict.fromkeys(tiny.CONTRASTIVE, sentence_embedding),
        "masked_lm": language_modelling,
        "cross_entropy": translation,
        "label_smoothed_cross_entropy": translation,
        "seq2seq_r3f": translation,
        "seq2seq_r_drop": translation,
        "seq2seq_distill": translation,
    }
