"""A run from its configuration to its checkpoint.

The same seed gives the same bytes, also when the run was killed and resumed.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from evalmode.bundle.frontend import open_frontend
from evalmode.errors import EvalmodeError
from evalmode.model import checkpoint
from evalmode.model.batches import UNLABELLED, encode
from evalmode.model.config import TrainConfig
from evalmode.model.data import open_data
from evalmode.model.data_set import DataSet
from evalmode.model.languages import letterless
from evalmode.model.learner import Learner
from evalmode.model.metrics import predict
from evalmode.model.preparation import prepare
from evalmode.model.resume import STATE_FILE, STATE_FOLDER, AtomicCheckpointIO, RunMismatch
from evalmode.model.train import Result, fit
from tests.model.conftest import (
    WORDS,
    Killed,
    contents,
    small_run,
    train,
    watch_steps,
    write_rows,
)

ROOT = Path(__file__).parents[2]
STEPS_AN_EPOCH = 13  # 200 labelled rows, and 512 texts without letters

CHILD = """
import os, signal, sys
from pathlib import Path
from evalmode.model.learner import Learner
from evalmode.model.train import fit
from tests.model.conftest import small_run

training_step = Learner.training_step
def deadly_step(self, batch, batch_idx):
    if self.global_step == 18:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, batch, batch_idx)
Learner.training_step = deadly_step
fit(small_run(Path(sys.argv[1])), out=Path(sys.argv[2]), cache=Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(data, tmp_path_factory.mktemp("runs") / "uninterrupted")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(
    data, tmp_path, uninterrupted
):
    train(data, tmp_path / "same")
    other = train(data, tmp_path / "other", seed=1)
    assert contents(tmp_path / "same") == contents(uninterrupted.checkpoint)
    assert other.weights_sha256 != uninterrupted.weights_sha256


def test_a_training_learns_and_returns_its_metrics_epochs_and_parameters(uninterrupted):
    assert uninterrupted.metrics["test"]["accuracy"] > 0.9
    assert uninterrupted.epochs == 2
    assert set(uninterrupted.metrics) == {"train", "validation", "test"}
    network = checkpoint.load(uninterrupted.checkpoint).module
    assert uninterrupted.parameters == sum(weight.numel() for weight in network.parameters())


NONSENSE = (
    *("asdf qwer", "!!!", "12345", "😀😀", "日本語のテキスト", "Привет", "", "x", "a" * 5_000),
    *("qwertyuiop " * 40, "\x00", "cat oak", "cow ivy fern hen", "12:30", "2024-01-01"),
)


@pytest.mark.parametrize("frontend", ["ngrams", "bpe"])
def test_no_text_gets_a_score_that_the_validation_rows_do_not_support(tmp_path, frontend):
    data = write_rows(tmp_path / "rows.csv", rows=400)
    result = fit(TrainConfig(data=str(data), frontend=frontend), out=tmp_path / "out", cache=data)
    finished = checkpoint.load(result.checkpoint)
    encoder = open_frontend(finished.frontend, finished.tokenizer)

    def highest(*texts: str) -> float:
        rows = encode(texts, [0] * len(texts), frontend=encoder)
        logits = torch.from_numpy(predict(finished.module, rows, spec=finished.frontend))
        return float(logits.softmax(-1).max())

    rows = int(result.metrics["validation"]["rows"])
    supported = (rows + 1) / (rows + 2)
    validation = open_data(str(data), text_column=None, label_column=None, cache=data).validation
    assert highest(*validation.texts) <= supported + 1e-4
    # The surest row bounds the temperature; nonsense may be a little surer than it.
    assert 1 - highest(*NONSENSE) > 0.5 * (1 - supported)


@pytest.mark.parametrize("frontend", ["ngrams", "bpe"])
@pytest.mark.parametrize("rows", [60, 300])
def test_texts_without_letters_get_even_scores_from_a_model_of_few_rows(tmp_path, rows, frontend):
    data = write_rows(tmp_path / "rows.csv", rows=rows)
    result = fit(
        TrainConfig(data=str(data), frontend=frontend, width=32, layers=1),
        out=tmp_path / "out",
        cache=data,
    )
    finished = checkpoint.load(result.checkpoint)
    texts = letterless(300, seed=99)
    encoded = encode(
        texts, [0] * len(texts), frontend=open_frontend(finished.frontend, finished.tokenizer)
    )
    logits = torch.from_numpy(predict(finished.module, encoded, spec=finished.frontend))
    scores = logits.softmax(-1).max(-1).values
    assert result.metrics["test"]["accuracy"] == 1.0
    assert float(scores.mean()) < 0.65
    assert float(scores.quantile(0.9)) < 0.8


def test_after_a_kill_9_a_resumed_run_ends_with_the_same_bytes(
    data, tmp_path, monkeypatch, uninterrupted
):
    out = tmp_path / "run"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(data), str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (out / STATE_FOLDER / STATE_FILE).exists()
    assert not (out / checkpoint.CHECKPOINT_FILE).exists()
    steps = watch_steps(monkeypatch)
    train(data, out, resume=True)
    assert steps == list(range(15, 2 * STEPS_AN_EPOCH))
    assert contents(out) == contents(uninterrupted.checkpoint)


@pytest.mark.parametrize(
    ("killed_at", "resumed_at"),
    [
        (3, 0),
        (5, 5),
        (STEPS_AN_EPOCH - 1, 10),
        (STEPS_AN_EPOCH, STEPS_AN_EPOCH),
        (2 * STEPS_AN_EPOCH - 1, 2 * STEPS_AN_EPOCH - 1),
    ],
)
def test_a_run_that_is_killed_at_any_step_ends_with_the_same_bytes(
    data, tmp_path, monkeypatch, uninterrupted, killed_at, resumed_at
):
    with monkeypatch.context() as patch:
        watch_steps(patch, die_at=killed_at)
        with pytest.raises(Killed):
            train(data, tmp_path)
    steps = watch_steps(monkeypatch)
    train(data, tmp_path, resume=True)
    assert steps == list(range(resumed_at, 2 * STEPS_AN_EPOCH))
    assert contents(tmp_path) == contents(uninterrupted.checkpoint)


def test_a_kill_while_the_state_is_written_leaves_the_previous_state(
    data, tmp_path, monkeypatch, uninterrupted
):
    written = []

    def cut_short(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise Killed

    def save(self, state, path, storage_options=None):
        if written:
            monkeypatch.setattr(Path, "write_bytes", cut_short)
        written.append(path)
        save_checkpoint(self, state, path)

    save_checkpoint = AtomicCheckpointIO.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
        with pytest.raises(Killed):
            train(data, tmp_path)
        monkeypatch.undo()
    train(data, tmp_path, resume=True)
    assert contents(tmp_path) == contents(uninterrupted.checkpoint)


def killed_save(*_args, **_options):
    """In place of `checkpoint.save`: the run is killed before it writes the checkpoint."""
    raise Killed


def test_a_kill_between_training_and_checkpoint_costs_nothing(
    data, tmp_path, monkeypatch, uninterrupted
):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed_save)
        with pytest.raises(Killed):
            train(data, tmp_path)
    train(data, tmp_path, resume=True)
    assert contents(tmp_path) == contents(uninterrupted.checkpoint)


def test_a_run_that_ran_out_of_patience_stays_stopped_when_it_is_resumed(
    data, tmp_path, monkeypatch
):
    options = {
        "learning_rate": 1e-30,
        "informed_table": False,
        "epochs": 9,
        "patience": 1,
        "dropout_kind": "classic",
    }
    expected = train(data, tmp_path / "uninterrupted", **options)
    assert expected.epochs < 9
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed_save)
        with pytest.raises(Killed):
            train(data, tmp_path / "killed", **options)
    assert train(data, tmp_path / "killed", resume=True, **options).epochs == expected.epochs


def test_a_finished_run_is_not_trained_again(data, tmp_path, monkeypatch, uninterrupted):
    train(data, tmp_path)
    monkeypatch.setattr(Learner, "training_step", None)
    accepted = train(data, tmp_path, resume=True)
    assert accepted.weights_sha256 == uninterrupted.weights_sha256
    assert accepted.metrics == uninterrupted.metrics


def test_a_run_is_resumed_only_with_the_same_options_and_never_replaced_by_mistake(
    data, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        watch_steps(patch, die_at=7)
        with pytest.raises(Killed):
            train(data, tmp_path)
    with pytest.raises(RunMismatch, match=r"dropout was 0\.2 and is now 0\.4"):
        train(data, tmp_path, resume=True, dropout=0.4)
    with pytest.raises(RunMismatch, match="data_sha256"):
        train(write_rows(tmp_path / "rows.csv", rows=250), tmp_path, resume=True)
    with pytest.raises(EvalmodeError, match="holds an unfinished training: continue with --resume"):
        train(data, tmp_path)


def test_a_run_that_reaches_its_time_limit_writes_a_checkpoint(data, tmp_path):
    result = train(data, tmp_path, max_minutes=1e-4, epochs=500, patience=500)
    assert result.epochs < 500
    assert checkpoint.load(tmp_path).module is not None


@pytest.mark.parametrize(
    "options", [{"frontend": "bpe"}, {"dropout_kind": "classic", "causal": True}]
)
def test_every_front_end_and_kind_of_dropout_trains(data, tmp_path, options):
    result = train(data, tmp_path, **options)
    assert result.metrics["test"]["accuracy"] > 0.8
    loaded = checkpoint.load(tmp_path)
    assert (loaded.tokenizer is None) == (options.get("frontend") != "bpe")


@pytest.mark.parametrize("frontend", ["ngrams", "bpe"])
def test_texts_that_the_model_reads_alike_are_never_in_two_parts(data, tmp_path, frontend):
    # bpe reads the first 127 tokens: these differ after them. n-grams read all digits alike.
    rows = list(csv.reader(data.read_text().splitlines()))[1:]
    longer = [(f"{text} {'and so on ' * 200}", label) for text, label in rows]
    twins = [(f"{text} {number}", label) for text, label in longer for number in (1, 2, 3)]
    other_label = {"animal": "plant", "plant": "animal"}
    contradictions = [(f"{text} 4", other_label[label]) for text, label in longer[:9]]
    path = tmp_path / "twins.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *twins, *contradictions])
    data_sets: list[DataSet] = []
    fit(
        small_run(path, frontend=frontend),
        out=tmp_path / "out",
        cache=tmp_path,
        show_data=data_sets.append,
    )
    (data_set,) = data_sets
    finished = checkpoint.load(tmp_path / "out")
    ids = [
        {finished.open_frontend().encode(text).ids.tobytes() for text in part.texts}
        for part in (data_set.train, data_set.validation, data_set.test)
    ]
    assert all(ids)
    assert len(ids[0] | ids[1] | ids[2]) == sum(map(len, ids)) == len(rows) - 9
    assert data_set.reading.left_out == {"duplicate": 2 * (len(rows) - 9), "contradictory": 4 * 9}
    assert finished.provenance["data"]["sha256"] == data_set.sha256


@pytest.mark.parametrize("frontend", ["ngrams", "bpe"])
def test_the_rows_that_stay_are_encoded_as_their_texts_and_labels_are(data, tmp_path, frontend):
    # bpe reads the first 127 tokens: these differ after them. n-grams read all digits alike.
    rows = list(csv.reader(data.read_text().splitlines()))[1:]
    long = [(f"{text} {'and so on ' * 200}", label) for text, label in rows[:60]]
    twins = [(f"{text} {number}", label) for text, label in long for number in (1, 2)]
    # Some rows of `rare` contradict others. The rest of them must be in the training part.
    rare = [(f"{text} {number}", "rare") for text, _ in long[:5] for number in (3, 4)]
    path = tmp_path / "twins.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows, *twins, *rare, ("elm elk", "rare")])
    config = small_run(path, frontend=frontend)
    data_sets: list[DataSet] = []
    run = prepare(config, cache=tmp_path, show_data=data_sets.append)
    (data_set,) = data_sets
    assert data_set.reading is not None
    assert data_set.reading.left_out["duplicate"] >= 60 - 9
    assert "rare" in data_set.train.labels
    encoder = open_frontend(run.spec, run.tokenizer)
    index_of = {label: index for index, label in enumerate(data_set.labels)}
    for part, rows, unlabelled in (
        (data_set.train, run.train, data_set.unlabelled),
        (data_set.validation, run.validation, data_set.unlabelled_validation),
        (data_set.test, run.test, ()),
    ):
        labels = [index_of[label] for label in part.labels] + [UNLABELLED] * len(unlabelled)
        expected = encode((*part.texts, *unlabelled), labels, frontend=encoder)
        for name in ("flat", "offsets", "labels"):
            assert np.array_equal(getattr(rows, name), getattr(expected, name))
            assert getattr(rows, name).dtype == getattr(expected, name).dtype


def test_a_training_prints_only_to_its_console_and_leaves_only_its_files(
    data, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "console").open("w") as console:
        fit(
            small_run(data),
            out=tmp_path / "out",
            cache=tmp_path,
            console=Console(file=console, force_terminal=True, width=200),
        )
    text = (tmp_path / "console").read_text()
    assert "accuracy" in text
    assert "epoch 2/2" in text
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"console", "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "checkpoint.json",
        "held_out.npz",
    }
    assert not torch.are_deterministic_algorithms_enabled()


def test_two_processes_train_together_through_the_command_line(data, tmp_path):
    out = tmp_path / "out"
    options = (
        "--devices 2 --strategy ddp --frontend ngrams --width 16 --layers 1 --heads 2 --batch-rows"
        " 8 --epochs 2"
    )
    command = [
        sys.executable,
        "-m",
        "evalmode.cli",
        "train",
        "--data",
        str(data),
        "--out",
        str(out),
        *options.split(),
    ]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    loaded = checkpoint.load(out)
    assert loaded.provenance["training"]["devices"] == 2
    assert loaded.metrics["test"]["accuracy"] > 0.9
    assert process.stdout.count("sha256 of the weights") == 1


def test_a_training_that_diverges_is_one_sentence_and_leaves_no_state(data, tmp_path):
    with pytest.raises(
        EvalmodeError,
        match=r"the validation loss is not finite after epoch 1: lower --learning-rate",
    ):
        train(data, tmp_path / "out", learning_rate=1e30)
    assert not (tmp_path / "out" / STATE_FOLDER).exists()


def test_a_strategy_that_lightning_does_not_know_is_one_sentence(data, tmp_path):
    with pytest.raises(EvalmodeError, match=r"Lightning cannot train with .*--strategy bogus"):
        train(data, tmp_path / "out", strategy="bogus")


def test_a_folder_that_cannot_be_written_is_one_sentence(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EvalmodeError, match=r"no training can be written to .*file"):
        train(data, tmp_path / "file")


def test_a_checkpoint_holds_no_more_of_a_text_than_a_model_may_read(tmp_path):
    lines = [
        # Texts with equal beginnings would count as one.
        f"{' '.join([word] * (number + 1))} {'and ' * 5_000},{label}"
        for number in range(15)
        for label, words in WORDS.items()
        for word in words[:3]
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    result = train(tmp_path / "rows.csv", tmp_path / "out", epochs=1)
    samples = checkpoint.load(result.checkpoint).sample_texts
    assert max(map(len, samples)) == 8_192
