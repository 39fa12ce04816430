from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.bundle.certificate import Statement
from evalmode.bundle.errors import BundleCorrupt, KnownAnswersDiffer
from evalmode.bundle.frontend import NgramFrontEnd, NgramSpec, collate
from evalmode.bundle.known_answers import KnownAnswer, pack, replay, unpack

FRONTEND = NgramFrontEnd(NgramSpec(lengths=(4, 8), orders=2, characters=2, vocabulary=64))


def run(inputs):
    """A model whose three logits depend on the sum of the ids."""
    total = inputs["input_ids"].sum(tuple(range(1, inputs["input_ids"].ndim)))
    return {
        "logits": np.stack([np.sin(total), np.cos(total), np.sin(total * 2)], axis=1).astype(
            np.float32
        )
    }


def answers_to(*texts: str) -> tuple[KnownAnswer, ...]:
    answers = []
    for text in texts:
        ids = FRONTEND.encode(text).ids
        inputs = collate([ids], length=FRONTEND.spec.padded_length(len(ids)))
        answers.append(KnownAnswer(text=text, inputs=inputs, outputs=run(inputs)))
    return tuple(answers)


ANSWERS = answers_to("", "Ez egy rövid mondat.", "half \ud83d")


@pytest.fixture
def replayed(parts, platform):
    """A function that replays answers, by default on the certifying platform."""

    def replayed(answers, run=run, *, frontend=FRONTEND, here=platform):
        return replay(
            answers, run, certificate=parts().certificate, platform=here, frontend=frontend
        )

    return replayed


@pytest.fixture
def elsewhere(platform):
    return platform.model_copy(update={"cpu_features": ("neon",)})


def off_by(relative: float):
    """The model with one logit changed by `relative` standard deviations of its row."""

    def changed(inputs):
        logits = run(inputs)["logits"]
        logits[:, 1] += relative * logits.std()
        return {"logits": logits}

    return changed


@given(
    st.lists(st.none() | st.text(st.characters(exclude_categories=())), max_size=4),
    st.integers(0, 2**32),
)
def test_answers_are_read_as_they_were_written(texts, seed):
    random = np.random.default_rng(seed)
    answers = tuple(
        KnownAnswer(
            text=text,
            inputs={
                "input_ids": random.integers(0, 9, (1, 3)),
                "nested/name": random.integers(0, 2, (1, 3)) > 0,
            },
            outputs={"logits": random.standard_normal((1, 5)).astype(np.float32)},
        )
        for text in texts
    )
    read = unpack(pack(answers))
    assert [answer.text for answer in read] == texts
    for unpacked, answer in zip(read, answers, strict=True):
        for kind in ("inputs", "outputs"):
            expected = getattr(answer, kind)
            assert getattr(unpacked, kind).keys() == expected.keys()
            for name, tensor in getattr(unpacked, kind).items():
                assert tensor.dtype == expected[name].dtype
                assert tensor.tobytes() == expected[name].tobytes()


def test_the_order_of_many_answers_is_kept():
    answers = tuple(dataclasses.replace(ANSWERS[0], text=str(index)) for index in range(12))
    assert [answer.text for answer in unpack(pack(answers))] == [str(index) for index in range(12)]


def test_the_same_answers_are_the_same_bytes():
    assert pack(ANSWERS) == pack(unpack(pack(ANSWERS)))


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_with_the_name_of_the_file(raw):
    with pytest.raises(BundleCorrupt, match=r"known_answers\.npz"):
        unpack(raw)


@given(
    at=st.integers(0, len(pack(ANSWERS)) - 1),
    bits=st.integers(1, 255),
    end=st.none() | st.integers(1, 900),
)
def test_a_damaged_file_is_refused_or_read_without_another_error(at, bits, end):
    raw = bytearray(pack(ANSWERS))
    raw[at] ^= bits
    try:
        unpack(bytes(raw[:end]))
    except BundleCorrupt as error:
        assert "known_answers.npz" in str(error)  # noqa: PT017 - most damage is refused; what is not is the hash's to find


def test_pickled_code_is_refused():
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **{"0/input/x": np.array([{"code": 1}], dtype=object)})
    with pytest.raises(BundleCorrupt, match=r"known_answers\.npz"):
        unpack(file.getvalue())


def test_on_the_certifying_platform_the_bits_agree(replayed):
    result = replayed(ANSWERS)
    assert (result.verdict, result.answers, result.largest_difference) == ("bitwise", 3, 0.0)


def test_an_output_that_the_model_does_not_have_is_refused_by_name(replayed):
    with pytest.raises(
        KnownAnswersDiffer,
        match="known answer 0 names an output that the model does not have: 'logits'",
    ):
        replayed(ANSWERS, lambda inputs: {"scores": run(inputs)["logits"]})


def test_a_replay_of_no_answers_has_a_verdict_that_says_so(replayed):
    assert replayed(()).verdict == "no answers"


def test_on_the_certifying_platform_not_one_bit_may_differ(replayed):
    def one_bit_off(inputs):
        return {"logits": np.nextafter(run(inputs)["logits"], np.float32(9))}

    with pytest.raises(KnownAnswersDiffer, match=r"known answer 0 is not reproduced.*not one bit"):
        replayed(ANSWERS, one_bit_off)


def test_on_another_platform_a_difference_within_the_tolerance_passes_and_is_reported(
    replayed, elsewhere
):
    result = replayed(ANSWERS, off_by(5e-6), here=elsewhere)
    assert result.verdict == "within tolerance"
    assert 1e-6 < result.largest_difference <= result.tolerance == 1e-5
    assert str(result) == "within tolerance (CPU features avx2 there, neon here)"


def test_a_proved_bundle_has_the_same_bits_on_every_platform(parts, elsewhere):
    holding = [
        Statement(name=name, holds=True, why="proved")
        for name in ("exact-arithmetic", "integer-saturation")
    ]
    proved = parts().certificate.model_copy(
        update={"schema_version": 2, "statements": tuple(holding)}
    )

    def replayed(run):
        return replay(ANSWERS, run, certificate=proved, platform=elsewhere, frontend=FRONTEND)

    assert replayed(run).verdict == "bitwise"
    with pytest.raises(
        KnownAnswersDiffer,
        match="not one bit is allowed; the certificate proves that no float32 rounds, so"
        " CPUExecutionProvider computes with fewer bits here",
    ):
        replayed(off_by(5e-6))

    # A product that may saturate does so on some processors only.
    saturating = proved.model_copy(
        update={"statements": (holding[0], holding[1].model_copy(update={"holds": False}))}
    )
    result = replay(
        ANSWERS, off_by(5e-6), certificate=saturating, platform=elsewhere, frontend=FRONTEND
    )
    assert result.verdict == "within tolerance"


def test_on_the_certifying_platform_there_are_no_differences_to_name(replayed):
    assert replayed(ANSWERS).differences == ()
    assert str(replayed(ANSWERS)) == "bitwise"


@pytest.mark.parametrize("here", [0, 1], ids=["there", "elsewhere"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_answer_with_other_bits_in_its_second_run_is_refused_by_its_number(
    replayed, platform, elsewhere, here, index
):
    text, runs = ANSWERS[index].text, []

    def run_with_a_dropout(inputs):
        logits = run(inputs)["logits"]
        if np.array_equal(inputs["input_ids"], ANSWERS[index].inputs["input_ids"]):
            runs.append(text)
            logits[0, 0] = (
                np.nextafter(logits[0, 0], np.float32(9)) if len(runs) == 2 else logits[0, 0]
            )
        return {"logits": logits}

    with pytest.raises(
        KnownAnswersDiffer,
        match=f"known answer {index} does not repeat: output 'logits' has other bits",
    ):
        replayed(ANSWERS, run_with_a_dropout, here=(platform, elsewhere)[here])


@pytest.mark.parametrize("twice", [True, False])
def test_each_answer_runs_twice_unless_the_caller_says_once(parts, platform, twice):
    runs = []

    def run_and_count(inputs):
        runs.append(inputs)
        return run(inputs)

    certificate = parts().certificate
    replay(
        ANSWERS,
        run_and_count,
        certificate=certificate,
        platform=platform,
        frontend=FRONTEND,
        twice=twice,
    )
    assert len(runs) == len(ANSWERS) * (1 + twice)


def test_an_answer_that_varies_between_runs_is_refused_at_any_tolerance(parts, elsewhere):
    draws = np.random.default_rng(5)
    generous = parts().certificate.model_copy(update={"tolerance": 1e9})
    with pytest.raises(KnownAnswersDiffer, match="known answer 0 does not repeat"):
        replay(
            ANSWERS,
            lambda inputs: {"logits": run(inputs)["logits"] * draws.uniform(0.9, 1.0)},
            certificate=generous,
            platform=elsewhere,
            frontend=FRONTEND,
        )


def test_on_another_platform_a_larger_difference_is_refused(replayed, elsewhere):
    with pytest.raises(KnownAnswersDiffer, match="at most 1e-05"):
        replayed(ANSWERS, off_by(1e-3), here=elsewhere)


def test_on_another_platform_no_label_may_flip_however_small_the_difference(replayed, elsewhere):
    tie = np.array([[1.0, np.nextafter(np.float32(1), np.float32(2)), -5.0]], np.float32)
    answer = dataclasses.replace(ANSWERS[0], outputs={"logits": tie})
    with pytest.raises(KnownAnswersDiffer, match="known answer 0"):
        replayed((answer,), lambda _: {"logits": tie[:, [1, 0, 2]]}, here=elsewhere)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_on_every_platform(
    replayed, platform, elsewhere, wrong
):
    for here in (platform, elsewhere):
        with pytest.raises(KnownAnswersDiffer):
            replayed(
                ANSWERS,
                lambda inputs: {"logits": run(inputs)["logits"] * np.float32(wrong)},
                here=here,
            )


def test_a_text_with_other_ids_is_refused_although_the_outputs_are_the_same(replayed):
    other_frontend = NgramFrontEnd(FRONTEND.spec.model_copy(update={"vocabulary": 63}))
    with pytest.raises(KnownAnswersDiffer, match="known answer 0 is encoded to other ids"):
        replayed(ANSWERS, frontend=other_frontend)


def test_a_text_that_is_encoded_to_fewer_positions_is_refused(replayed):
    answer = dataclasses.replace(answers_to("a longer text")[0], text="a")
    with pytest.raises(KnownAnswersDiffer, match="other ids"):
        replayed((answer,))


def test_without_a_front_end_only_the_tensors_are_replayed(replayed):
    answers = tuple(dataclasses.replace(answer, text=None) for answer in ANSWERS)
    assert replayed(answers, frontend=None).answers == 3
    assert replayed(ANSWERS, frontend=None).answers == 3
