"""What the numbers of `audiomaepp.evaluate` must agree with: scikit-learn, themselves, a baseline on recordings."""

import csv
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audiomaepp import audio, validation
from audiomaepp.data import open_recordings
from audiomaepp.evaluate import (
    Report,
    average_scores,
    chance,
    confusion,
    evaluate_embeddings,
    fit_probe,
    knn_accuracy,
    knn_predict,
    linear_probe,
    logmel_statistics,
    make_report,
    standardize,
    wilson_interval,
)
from audiomaepp.train import collapse_warning

ESC10 = Path(__file__).parents[2] / "shared" / "data" / "esc10"


def clouds(n=400, dim=32, classes=5, gap=0.5, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = (gap * rng.normal(size=(classes, dim))[y] + rng.normal(size=(n, dim))) @ rng.normal(size=(dim, dim))
    return x[: n * 3 // 4], y[: n * 3 // 4], x[n * 3 // 4 :], y[n * 3 // 4 :]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_knn_agrees_with_scikit_learn_wherever_the_vote_is_not_tied(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    train_x, train_y, test_x, _ = clouds()
    a, b = standardize(train_x, test_x)
    theirs = neighbors.KNeighborsClassifier(k, metric="cosine").fit(a, train_y)
    votes = np.sort(theirs.predict_proba(b), axis=1)
    clear = votes[:, -1] > votes[:, -2]
    assert clear.sum() > 50
    np.testing.assert_array_equal(knn_predict(train_x, train_y, test_x, k)[clear], theirs.predict(b)[clear])


@pytest.mark.parametrize("l2", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("dim", [32, 500]) # fewer and more dimensions than clips: two ways through the fit
def test_probe_has_the_optimum_of_scikit_learn(l2, dim):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train_x, train_y, test_x, _ = clouds(dim=dim)
    a, b = standardize(train_x, test_x)
    theirs = linear_model.LogisticRegression(C=1 / (len(a) * l2), tol=1e-7, max_iter=5000).fit(a, train_y)
    ours = fit_probe(train_x, train_y, l2=l2)
    np.testing.assert_allclose(ours.logits(test_x).softmax(1).numpy(), theirs.predict_proba(b), atol=0.01)
    assert (ours.predict(test_x) == theirs.predict(b)).mean() > 0.98


def test_the_penalty_never_looks_at_the_held_out_clips():
    train_x, train_y, test_x, test_y = clouds()
    probe = fit_probe(train_x, train_y)
    assert probe.l2 == min(probe.tried, key=probe.tried.get)
    assert linear_probe(train_x, train_y, test_x, test_y) == linear_probe(train_x, train_y, test_x, test_y, l2=probe.l2)


def test_scores_are_the_same_every_time_and_inside_no_grad():
    data = clouds()
    with torch.no_grad():
        first = evaluate_embeddings(*data)
    torch.manual_seed(99)
    assert evaluate_embeddings(*data) == first


def test_evaluating_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    evaluate_embeddings(*clouds())
    assert torch.rand(1) == expected


def test_blocks_do_not_change_the_answer():
    train_x, train_y, test_x, _ = clouds()
    whole = knn_predict(train_x, train_y, test_x)
    np.testing.assert_array_equal(knn_predict(train_x, train_y, test_x, chunk=7), whole)


def test_similarities_to_many_clips_fit_into_a_budget():
    """A thousand clips beside a million are 4 GB of similarities: an evaluation overnight would be killed."""
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
                self.numbers = max(self.numbers, out.numel())
            return out

    rng = np.random.default_rng(0)
    train_x, test_x = (rng.standard_normal((n, 2), dtype=np.float32) for n in (200_000, 700))
    with Largest() as largest:
        knn_predict(train_x, np.arange(200_000) % 3, test_x, k=1)
    assert 2**21 < largest.numbers <= 2**22


def test_shuffled_labels_score_at_chance():
    train_x, train_y, test_x, test_y = clouds(gap=3.0)
    rng = np.random.default_rng(0)
    for score in (knn_accuracy, linear_probe):
        mean = np.mean([score(train_x, rng.permutation(train_y), test_x, test_y) for _ in range(10)])
        assert abs(mean - 0.2) < 0.08, score
        assert score(train_x, train_y, test_x, test_y) == 1.0


def test_how_classes_are_called_does_not_matter():
    train_x, train_y, test_x, test_y = clouds()
    names = np.array(["dog", "rain", "clock", "crow", "sea"])
    numbers, words = evaluate_embeddings(*clouds()), evaluate_embeddings(train_x, names[train_y], test_x, names[test_y])
    assert numbers["linear"] == pytest.approx(words["linear"], abs=0.011) # classes are in another order
    assert all(numbers[k] == pytest.approx(words[k]) for k in numbers if k != "linear")
    with pytest.raises(ValueError, match="must be of one kind, got numbers and names"):
        knn_accuracy(train_x, names[train_y], test_x, test_y)


def test_unlabeled_clips_take_no_part():
    train_x, train_y, test_x, test_y = clouds()
    train_y, test_y = train_y.copy(), test_y.copy()
    train_y[::3], test_y[::4] = -1, -1
    seen, asked = train_y >= 0, test_y >= 0
    assert knn_accuracy(train_x, train_y, test_x, test_y) == knn_accuracy(
        train_x[seen], train_y[seen], test_x[asked], test_y[asked]
    )
    assert -1 not in knn_predict(train_x, train_y, test_x)
    assert set(evaluate_embeddings(train_x, -np.ones(len(train_x)), test_x, test_y)) == {
        "alignment", "uniformity", "rankme", "n_train", "n_test"
    }


def test_embeddings_of_zeros_are_reported_as_collapsed():
    _, train_y, _, test_y = clouds()
    report = make_report(np.zeros((len(train_y), 8)), train_y, np.zeros((len(test_y), 8)), test_y)
    scores = report.rows["this model"]
    assert scores["uniformity"] == scores["alignment"] == 0 and scores["rankme"] == pytest.approx(1, abs=0.01)
    assert "-4.00" not in str(report)
    assert "collapsed to one direction" in collapse_warning(torch.zeros(16, 8))


@pytest.mark.parametrize("kind", [np.float16, np.float64, torch.float32, torch.bfloat16, list])
def test_any_array_will_do(kind):
    train_x, train_y, test_x, test_y = clouds(gap=3.0)
    as_kind = {
        True: lambda x: torch.tensor(x).to(kind).requires_grad_(),
        False: lambda x: x.tolist() if kind is list else x.astype(kind),
    }[isinstance(kind, torch.dtype)]
    scores = evaluate_embeddings(as_kind(train_x), train_y.tolist(), as_kind(test_x), torch.tensor(test_y))
    assert scores["knn"] == 1.0
    assert all(isinstance(v, float | int) for v in scores.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train_y=[0, 1]), r"train_y must hold one label for each of 300 .*, got shape \(2,\)"),
        (dict(train_x=np.zeros((0, 32)), train_y=[]), r"train_x must have shape .*, got \(0, 32\)"),
        (dict(test_x=np.zeros(32)), r"test_x must have shape .*, got \(32,\)"),
        (dict(test_x=np.full((100, 32), np.inf)), "test_x must hold finite .* NaN or infinity in 100 of 100 rows"),
        (dict(test_x=np.zeros((100, 31))), "must have the 32 dimensions of train_x, got 31"),
        (dict(test_y=np.full(100, 0.5)), "test_y must hold whole numbers or names, got float64"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    good = dict(zip(("train_x", "train_y", "test_x", "test_y"), clouds(), strict=True))
    for score in (knn_accuracy, linear_probe, evaluate_embeddings):
        with pytest.raises(ValueError, match=message):
            score(**{**good, **change})


def test_collapsed_embeddings_are_a_score_and_not_a_crash():
    train_y, test_y = np.arange(40) % 4, np.arange(20) % 4
    scores = evaluate_embeddings(np.ones((40, 8)), train_y, np.ones((20, 8)), test_y)
    assert scores["knn"] <= 0.5 and scores["linear"] == 0.25
    assert scores["uniformity"] == pytest.approx(0, abs=1e-5)
    assert scores["rankme"] == pytest.approx(1, abs=1e-3)


def test_one_held_out_clip_of_a_class_that_training_lacks():
    train_x, train_y, test_x, _ = clouds()
    scores = evaluate_embeddings(train_x, train_y, test_x[:1], [77])
    assert scores["knn"] == scores["linear"] == 0.0
    assert "alignment" not in scores and "uniformity" not in scores # one clip has no pair


def test_confusion_counts_and_chance():
    counts, names = confusion(["a", "b", "b"], ["b", "b", "c"])
    assert names == ["a", "b", "c"]
    assert counts.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert chance([0, 0, 1, 1], [0, 0, 0, 1]) == 0.5 # a tie: the mean of always 0 and always 1


def test_wilson_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = rng.binomial(80, 0.9, size=2000)
    covered = [low <= 0.9 <= high for low, high in (wilson_interval(h / 80, 80) for h in hits)]
    assert 0.93 < np.mean(covered) < 0.98
    with pytest.raises(ValueError, match="n=0"):
        wilson_interval(0.5, 0)


def test_a_report_survives_its_files(tmp_path):
    train_x, train_y, test_x, test_y = clouds()
    three = {"three numbers": (train_x[:, :3], test_x[:, :3])}
    report = make_report(train_x, train_y, test_x, test_y, three, protocol='a, "b"')
    assert list(report.rows) == ["this model", "three numbers", "chance"]
    report.to_json(tmp_path / "results.json")
    report.to_csv(tmp_path / "results.csv")
    back = json.loads((tmp_path / "results.json").read_text())
    assert back["rows"]["this model"]["knn"] == report.rows["this model"]["knn"]
    with (tmp_path / "results.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["name"] for r in rows] == list(report.rows)
    assert rows[0]["protocol"] == 'a, "b"'
    assert float(rows[0]["knn_low"]) < float(rows[0]["knn"]) < float(rows[0]["knn_high"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.csv", "results.json"]
    assert len({line.rfind(")") for line in str(report).splitlines()[2:4]}) == 1 # aligned


def test_an_unlabeled_report_holds_what_needs_no_label():
    train_x, _, test_x, _ = clouds()
    report = make_report(train_x, None, test_x, None, {"three numbers": (train_x[:, :3], test_x[:, :3])})
    assert list(report.rows) == ["this model"]
    assert "RankMe" in str(report) and "kNN" not in str(report) and "chance" not in report.rows
    assert "n_test" in Report("x").add("a", {"n_test": 3}).to_json()


def report_of(model, baseline, n_test=80):
    report = Report("80 held-out clips").add("this model", {**model, "n_test": n_test})
    return report.add("log-mel statistics", baseline).add("chance", {"knn": 0.1, "linear": 0.1})


def test_a_model_at_or_below_a_baseline_is_said_so():
    """A model that only ties with four statistics of a spectrogram has learned nothing, whatever its loss."""
    for model in ({"knn": 0.75}, {"knn": 0.75, "linear": 0.99}, {"knn": 0.6, "linear": 0.5}):
        said = report_of(model, {"knn": 0.75, "linear": 0.5}).verdict()
        assert said.startswith("This model is not above the best baseline (kNN-10 0.") and said.count(". ") == 0
        assert "of log-mel statistics" in said and "semantic" in said and "words" in said and "labels" in said
    worst = Report("x").add("this model", {"knn": 0.3}).add("statistics", {"knn": 0.1}).add("chance", {"knn": 0.5})
    assert "0.30 against 0.50 of chance" in worst.verdict()


def test_each_accuracy_is_compared_with_its_best_baseline():
    "Whitened statistics may have better neighbors and a worse linear probe: a model must beat the better one in each."
    report = report_of({"knn": 0.8, "linear": 0.8}, {"knn": 0.6, "linear": 0.9})
    said = report.add("log-mel statistics, whitened", {"knn": 0.85, "linear": 0.7}).verdict()
    assert "kNN-10 0.80 against 0.85 of log-mel statistics, whitened; linear 0.80 against 0.90 of log-mel" in said


def test_a_lead_within_the_interval_is_called_that():
    said = report_of({"knn": 0.80, "linear": 0.99}, {"knn": 0.75, "linear": 0.5}).verdict(["longer training"])
    assert said == ("This model is above the best baseline, but by less than its interval "
                    "(kNN-10 0.80 against 0.75 of log-mel statistics); try longer training.")
    low, _ = wilson_interval(0.80, 80)
    assert low < 0.75


def test_nothing_is_said_of_a_clear_lead_or_without_labels():
    assert report_of({"knn": 0.95, "linear": 0.97}, {"knn": 0.75, "linear": 0.8}).verdict() == ""
    assert Report("x").add("this model", {"rankme": 9.0, "n_test": 80}).verdict() == Report("x").verdict() == ""


def test_statistics_of_clips_that_differ_in_length():
    clips = [np.random.default_rng(i).normal(size=(t, 8)).astype(np.float32) for i, t in enumerate((50, 1, 7))]
    stats = logmel_statistics(clips)
    assert stats.shape == (3, 32) and np.isfinite(stats).all()
    np.testing.assert_allclose(stats[2, :8], clips[2].mean(0), atol=1e-5)
    np.testing.assert_allclose(stats[2, 16:24], np.diff(clips[2], axis=0).std(0), atol=1e-5)
    empty = [np.zeros((0, 8))]
    for bad, message in (([], "at least one spectrogram, got none"), (empty, r"spectrogram 0 must .*, got \(0, 8\)")):
        with pytest.raises(ValueError, match=message):
            logmel_statistics(bad)


def test_the_recordings_of_the_statistics_are_decoded_ahead(tmp_path, monkeypatch):
    """In one thread, each compressed file or address would be waited for while the other cores idle."""
    for i in range(40):
        soundfile.write(tmp_path / f"{i:02d}.flac", np.random.default_rng(i).uniform(-0.5, 0.5, 4000 + 160 * i), 16000)
    sounds, sound, opened, ahead = open_recordings(tmp_path), audio._sound, [], []
    monkeypatch.setattr(audio, "_sound", lambda *args: opened.append(threading.get_ident()) or sound(*args))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for i, spec in enumerate(validation.spectra(sounds, range(40))):
        ahead.append(len(opened) - i)
        assert len(spec) == 1 + (4000 + 160 * i) // 160  # in order
    assert len(opened) == 40 and threading.get_ident() not in opened
    assert max(ahead) <= 9  # they are in memory, so they are few


def logmel(wav, sample_rate=16000, n_mels=80):
    "An independent log-mel: HTK bands from 50 to 8000 Hz, 25 ms windows every 10 ms."
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.array([50, 8000]) / 700)), n_mels + 2) / 2595) - 1)
    slopes = edges - np.linspace(0, sample_rate / 2, 201)[:, None]
    bands = np.maximum(0, np.minimum(-slopes[:, :-2] / np.diff(edges)[:-1], slopes[:, 2:] / np.diff(edges)[1:]))
    power = torch.stft(wav, 400, 160, window=torch.hann_window(400), return_complex=True).abs().square()
    return (power.T @ torch.tensor(bands, dtype=torch.float32) + 1.19e-7).log()


@pytest.mark.slow
@pytest.mark.skipif(not ESC10.exists(), reason="needs the ESC-10 recordings")
def test_the_baseline_on_real_recordings():
    """log-mel statistics on ESC-10, five folds: logistic 0.85, kNN 0.75 with scikit-learn's Euclidean neighbors.

    Cosine neighbors reach 0.78 with scikit-learn's ties and 0.80 with ours.
    """
    with next((ESC10 / "meta").glob("*.csv")).open() as f:
        table = list(csv.DictReader(f))
    wavs = [torch.from_numpy(soundfile.read(ESC10 / "audio" / r["filename"], dtype="float32")[0]) for r in table]
    x = logmel_statistics([logmel(w) for w in wavs])
    y, fold = np.array([r["category"] for r in table]), np.array([int(r["fold"]) for r in table])
    folds = [evaluate_embeddings(x[fold != f], y[fold != f], x[fold == f], y[fold == f]) for f in range(1, 6)]
    scores = average_scores(folds)
    assert scores["n_test"] == 400
    assert scores["knn"] == pytest.approx(0.80, abs=0.03)
    assert scores["linear"] == pytest.approx(0.85, abs=0.03)


def test_a_perfect_score_is_not_advised_to_train_longer():
    said = report_of({"knn": 1.0, "linear": 1.0}, {"knn": 1.0, "linear": 1.0}).verdict(["longer training"])
    assert "every held-out clip" in said and "longer training" not in said
