"""What the report of `flame.analyze` says at a glance: differences, their spread, and hints."""

import pytest

from flame.analysis.records import Recorder, Results
from flame.analysis.report import answers, tables


def results(arms, *, lengths=(64,), trained=64, seeds=None):
    """Records of ``arms``: label -> a loss for each seed, the same at every length."""
    setup = Recorder("", "")
    setup.add("setup", "", sink_eps=[0.2, 0.3], sparsity_eps=[1e-5])
    records = setup.records
    for label, losses in arms.items():
        numbers = (seeds or {}).get(label, range(len(losses)))
        for number, (value, seed) in enumerate(zip(losses, numbers, strict=True)):
            recorder = Recorder(f"{label}-{number}", label)
            finite = 0.0 if value is None else value
            for length in lengths:
                recorder.add("loss", value, length=length)
                recorder.add("kurtosis", 100 * finite, length=length)
                recorder.add("zeros", finite / 10, length=length)
                for eps in (0.2, 0.3):
                    recorder.add("sink_rate", finite / 10 + eps, length=length, eps=eps)
            recorder.add("model", 1, normalizer="softmax", training_length=trained, seed=seed)
            records += recorder.records
    return Results(records)


def said(found, title="Loss"):
    return dict(answers.sentences(found))[title]


def test_a_difference_beyond_the_spread():
    # gaps of 1.0 and 1.2, though each arm's losses spread by far more
    found = results({"softmax": [1.0, 5.0], "softpick": [2.0, 6.2]})
    text = "softpick 4.1000 nats per token, 1.1000 ± 0.1414 above softmax (3.0000)."
    assert said(found) == text
    assert (
        said(found, "Massive activations") == "softpick kurtosis 410, 110 ± 14 above softmax (300)."
    )
    sparse = "softpick 41.00 % exact zeros, 11.00 ± 1.41 points above softmax (30.00)."
    assert said(found, "Sparsity") == sparse
    # 0.3, not 0.2
    sinks = "softpick 71.00 % of heads above 0.3, 11.00 ± 1.41 points above softmax (60.00)."
    assert said(found, "Sinks") == sinks
    assert [title for title, _ in answers.sentences(found)] == [
        *("Loss", "Sinks", "Massive activations", "Sparsity"),
    ]
    assert "softpick 2.0000 nats per token, 1.0000 below b (3.0000)" in said(
        results({"b": [3.0], "softpick": [2.0]})
    )


def test_a_difference_within_the_spread():
    found = results({"a": [1.0, 2.0], "b": [1.5, 1.0]})
    # gaps of 0.5 and -1.0
    text = "b 1.2500 nats per token, 0.2500 ± 1.0607 below a (1.5000), within the spread."
    assert said(found) == text
    row = answers.table(found).rows[1]
    assert row[:2] == ["b", "1.2500 (−0.2500 ± 1.0607 ≈)"]
    assert "≈: within that spread" in answers.note(found)
    level = results({"a": [1.0, 2.0], "b": [2.0, 1.0]})
    assert "0.0000 ± 1.4142 from a (1.5000), within the spread" in said(level)


def test_one_seed_is_a_hint():
    found = results({"a": [1.0], "b": [1.5]})
    assert said(found) == "b 1.5000 nats per token, 0.5000 above a (1.0000); one seed, a hint."
    assert answers.table(found).rows[1][1] == "1.5000 (+0.5000 ?)"
    assert "±" not in answers.note(found)
    same = results({"a": [1.0], "b": [1.0]})
    assert said(same) == "b 1.0000 nats per token, the same as a; one seed, a hint."
    # against the same seed of an arm with more
    seeds = {"a": [1, 2, 3], "b": [2]}
    found = results({"a": [1.0, 3.0, 5.0], "b": [3.5]}, seeds=seeds)
    assert "0.5000 above a (3.0000); one seed, a hint" in said(found)


@pytest.mark.parametrize(
    "seeds", [{"a": [1, 2], "b": [3, 4]}, {"a": [None] * 2, "b": [None] * 2}, {"a": [1, 1]}]
)
def test_without_matching_seeds_the_variances_add(seeds):
    found = results({"a": [1.0, 2.0], "b": [5.0, 7.0]}, seeds=seeds)
    # variances of 0.5 and 2
    assert f"4.5000 ± {2.5**0.5:.4f} above a (1.5000)" in said(found)
    assert answers.note(found).split(". ")[1].startswith("± is the root of the sum of both")
    matched = results({"a": [1.0, 2.0], "b": [5.0, 7.0]}, seeds={"a": [1, 2], "b": [2, 1]})
    # gaps of 5 - 2 and 7 - 1
    assert f"4.5000 ± {4.5**0.5:.4f} above a" in said(matched)
    assert "seed by seed" in answers.note(matched)


def test_ten_arms_are_one_sentence():
    arms = {"softmax": [2.0, 2.1, 2.2]}
    arms |= {f"arm{n}": [2.0 + n / 100, 2.1 + n / 100, 2.2 + n / 50] for n in range(-4, 5)}
    arms["arm0"] = [2.01, 2.1, 2.19]
    text = said(results(arms))
    assert text.startswith(
        "softmax 2.1000 nats per token; lowest arm-4, −0.0533 ± 0.0231; highest arm4, +0.0533"
    )
    assert text.endswith("; within the spread: arm0.")
    noisy = {f"arm{n}": [2.0 + n, 2.1 - n, 2.2] for n in range(1, 10)}
    text = said(results({"softmax": [2.0, 2.1, 2.2]} | noisy))
    assert text.startswith("softmax 2.1000 nats per token; every arm within the spread, arm")
    half = dict(list(arms.items())[:6]) | dict(list(noisy.items())[5:])
    assert said(results(half)).endswith("within the spread: 5 of 9.")
    one = said(results({label: losses[:1] for label, losses in arms.items()}))
    assert one.endswith("one seed, a hint.")
    mixed = said(results(arms | {"arm4": [9.0]}))
    assert "highest arm4, +7.0000; " in mixed
    assert mixed.endswith("within the spread: arm0; one seed, a hint: arm4.")
    broken = said(results(arms | {"arm4": [None] * 3}))
    assert broken.endswith("not finite: arm4.")
    assert len(answers.table(results(arms)).rows) == 10


def test_an_arm_alone_and_one_that_diverged():
    assert said(results({"a": [1.0, 2.0]})) == "a 1.5000 nats per token."
    assert answers.note(results({"a": [1.0]})) == ""
    assert said(results({"a": [1.0], "b": [None]})) == "b not finite nats per token, a 1.0000."


@pytest.mark.parametrize(
    ("lengths", "trained", "expected", "words"),
    [
        ((16, 64, 256), 64, 64, "at 64 tokens (the training length)"),
        ((16, 64, 256), 128, 64, "at 64 tokens (trained at 128)"),
        ((256, 512), 128, 256, "at 256 tokens (trained at 128)"),
        ((16, 64), None, 64, "at 64 tokens (training length unknown)"),
    ],
)
def test_the_sentences_are_about_the_training_length(lengths, trained, expected, words):
    found = results({"a": [1.0], "b": [2.0]}, lengths=lengths, trained=trained)
    assert found.main_length == found.lengths_to_show[0] == expected
    assert sorted(found.lengths_to_show) == list(lengths)
    assert found.lengths_to_show[1:] == sorted(found.lengths_to_show[1:], reverse=True)
    assert answers.lead(found) == f"2 arms, 1 seed each, {words}"
    for length in lengths:
        is_beyond = trained is not None and length > trained
        assert tables.tokens(found, length).endswith("beyond the training length)") == is_beyond


def test_arms_of_several_training_lengths_are_named():
    found = results({"a": [1.0], "b": [2.0]})
    found.models[1]["training_length"] = 32
    assert found.training_length == 32
    assert tables._trained(found) == "training length: 64 (a), 32 (b)"
    for record in found.models:
        record["training_length"] = None
    assert tables._trained(found).startswith("the training length is unknown")


def test_seeds_that_one_arm_lacks_are_left_out_of_the_difference_and_said():
    seeds = {"softmax": [1, 2], "softpick": [1, 2, 3]}
    found = results({"softmax": [3.1, 3.1], "softpick": [3.0, 3.05, 6.0]}, seeds=seeds)
    assert said(found).endswith(
        "0.0750 ± 0.0354 below softmax (3.1000); over the seeds that both have."
    )
    whole = "A difference is over the seeds that both arms have, a mean over all seeds."
    assert whole in answers.note(found)
    assert whole not in answers.note(results({"a": [1.0, 2.0], "b": [1.0, 2.5]}))


def test_the_only_finite_arm_is_named_once():
    found = results({"softmax": [3.0], "a": [3.1], "b": [None]})
    assert (
        said(found) == "softmax 3.0000 nats per token; a, +0.1000; one seed, a hint; not finite: b."
    )
