"""`features`: frozen features, their neighbours and the linear probe, against numpy."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from timm.models import save_for_hf

from metala_vision.cli import main
from metala_vision.config import DataConfig
from metala_vision.errors import UserError
from metala_vision.evaluate import evaluation_transform
from metala_vision.features import judge
from metala_vision.features.extract import create, extract
from metala_vision.splits import find_split

SMALL = ["--model-kwargs", "embed_dim=32", "depth=2", "num_heads=1"]


def blobs(classes=7, each=40, channels=12, spread=1.4, seed=0):
    """Features of overlapping classes, scaled and shifted by channel: train, labels, queries,
    labels."""
    draws = np.random.default_rng(seed)
    centres = draws.normal(size=(classes, channels))
    labels = np.repeat(np.arange(classes), each)
    scale, shift = draws.uniform(0.1, 30, channels), draws.normal(size=channels)
    parts = []
    for _ in range(2):
        points = centres[labels] + spread * draws.normal(size=(len(labels), channels))
        parts += [(points * scale + shift).astype(np.float32), labels]
    return parts


def test_weighted_neighbours_by_hand():
    """Each query's vote written out in float64; CHUNK does not divide the queries."""
    train, labels, queries, _ = blobs()
    k, classes = 20, 9  # two classes have no images
    similarities, indices = judge.neighbours(train, queries, k)
    guesses = judge.vote(similarities, labels[indices], classes)
    known = train.astype(float) / np.linalg.norm(train.astype(float), axis=1, keepdims=True)
    for query, own_indices, own in zip(queries.astype(float), indices, guesses, strict=True):
        cosine = known @ (query / np.linalg.norm(query))
        nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:k]
        assert set(own_indices) == set(nearest)
        votes = dict.fromkeys(range(classes), 0.0)
        for i in nearest:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        order = sorted((c for c in votes if votes[c] > 0), key=lambda c: -votes[c])[:5]
        assert list(own) == order + [-1] * (5 - len(order))


def test_near_neighbours_outvote_many():
    """Three of four neighbours are of class 0, the nearest of class 1: its weight is larger."""
    similarities = np.array([[0.9, 0.8, 0.8, 0.8]])
    labels = np.array([[1, 0, 0, 0]])
    assert np.exp(0.1 / 0.07) > 3
    assert judge.vote(similarities, labels, 2).tolist() == [[1, 0]]
    similarities[0, 0] = 0.85  # exp(0.05 / 0.07) < 3
    assert judge.vote(similarities, labels, 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("classes", [2, 7])
def test_the_probe_is_a_logistic_regression_on_standardised_features(classes):
    """Written out: at the optimum the gradient of the penalised loss is zero, and nothing of the
    held-out part, its mean neither, is seen."""
    train, labels, queries, wanted = blobs(classes)
    probe = judge.linear_probe(train, labels, queries, seed=0)
    assert [trial.C for trial in probe.trials] == list(judge.GRID)
    assert probe.converged and probe.C == max(probe.trials, key=lambda x: x.top1).C
    mean, std = train.astype(float).mean(0), train.astype(float).std(0)
    ours = (train - mean) / std
    by_hand = LogisticRegression(C=probe.C, max_iter=1000).fit(ours, labels)
    if classes > 2:
        scores = ours @ by_hand.coef_.T + by_hand.intercept_
        share = np.exp(scores - scores.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        gradient = probe.C * (share - np.eye(classes)[labels]).T @ ours + by_hand.coef_
        # lbfgs stops at a gradient of 1e-4 of the mean loss
        assert abs(gradient).max() < 2e-4 * probe.C * len(labels)
    expected = by_hand.decision_function((queries - mean) / std)
    if classes == 2:
        expected = np.stack([-expected, expected], 1)
    assert (probe.guesses == np.argsort(-expected, 1)[:, :5]).mean() > 0.99
    alone = judge.linear_probe(train, labels, queries[:1], seed=0)
    assert alone.C == probe.C and (alone.guesses == probe.guesses[:1]).all()
    top1, top5 = judge.accuracy(probe.guesses, wanted)
    assert top1 > 100 * 1.5 / classes or classes == 2
    assert top5 == 100 if classes == 2 else top1 < top5 < 100


def test_C_is_chosen_on_training_images_alone(monkeypatch):
    seen = []
    fit = judge._fit
    monkeypatch.setattr(judge, "_fit", lambda x, y, C: seen.append((x, y, C)) or fit(x, y, C))
    train, labels, queries, _ = blobs(classes=3, each=11)
    probe = judge.linear_probe(train, labels, queries, seed=3)
    *trials, (whole, _, C) = seen
    assert len(trials) == len(judge.GRID) and len(whole) == 33 and probe.C == C
    part = judge.held_part(labels, 3)
    assert [int(part[labels == c].sum()) for c in range(3)] == [2, 2, 2]
    for features, _, _ in trials:
        np.testing.assert_array_equal(features, train[~part])
    top1 = {trial.C: trial.top1 for trial in probe.trials}
    model, _, _ = fit(train[~part].astype(float), labels[~part], C)
    assert top1[C] == pytest.approx(100 * (model.predict(train[part]) == labels[part]).mean())
    assert (judge.held_part(labels, 4) != part).any()


def test_what_did_not_converge_is_said(monkeypatch):
    train, labels, queries, _ = blobs(classes=3)
    monkeypatch.setattr(judge, "MAX_ITER", 2)
    probe = judge.linear_probe(train, labels, queries, seed=0)
    assert not probe.converged and not any(trial.converged for trial in probe.trials)
    assert probe.iterations == 2


def test_a_class_with_one_image_is_not_held_out():
    train, labels, queries, _ = blobs(classes=2, each=1)
    probe = judge.linear_probe(train, labels, queries, seed=0)
    assert probe.trials == [] and probe.C == 1 and not probe.at_edge
    with pytest.raises(UserError, match="of two classes"):
        judge.linear_probe(train[:1], labels[:1], queries, seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A transformer of timm's own; its class token's features, which a norm ends, are pooled."""
    folder = tmp_path_factory.mktemp("run") / "last"
    torch.manual_seed(1)
    save_for_hf(timm.create_model("test_vit", num_classes=4), folder, safe_serialization=True)
    return folder


@pytest.mark.parametrize("kind", ["shipped", "folder"])
def test_features_are_those_before_the_classifier(digit_tree, checkpoint, kind):
    name = "metala_nano" if kind == "shipped" else str(checkpoint)
    split = find_split(DataConfig(data_dir=digit_tree))
    model, seen = create(name, False, {}), []
    config = DataConfig(batch_size=5, workers=0)
    part = extract(model, split.val, split.val_indices, config, torch.device("cpu"), "held-out")
    last = model.head.fc if kind == "shipped" else model.head
    last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    _, transform = evaluation_transform(model.pretrained_cfg)
    files = sorted(digit_tree.glob("val/*/*.png"))
    with torch.no_grad():
        model(torch.stack([transform(Image.open(path)) for path in files]))
    np.testing.assert_allclose(part.features, seen[0].numpy(), rtol=1e-4, atol=1e-5)
    assert part.names == [str(path) for path in files]
    assert part.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len({*map(tuple, part.features)}) == 12


def test_random_init_is_the_model_before_training(checkpoint):
    for name in ("metala_nano", str(checkpoint)):
        trained, fresh, again = (create(name, random, {}) for random in (False, True, True))
        ours, theirs, third = (next(iter(x.parameters())) for x in (trained, fresh, again))
        assert ours.shape == theirs.shape and not ours.equal(theirs) and theirs.equal(third)
        assert trained.pretrained_cfg["input_size"] == fresh.pretrained_cfg["input_size"]


def judged(tmp_path, *flags):
    out = tmp_path / "out.json"
    given = [str(flag) for flag in flags]
    assert main(["features", *given, "--workers", "0", "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_digits_in_a_folder(tmp_path, digit_tree, capsys):
    """Everything at once; the arrays give the same figures again."""
    npz, picture = tmp_path / "f.npz", tmp_path / "f.png"
    told = judged(tmp_path, "metala_nano", "--data-dir", digit_tree, "--baseline", "--k", 3, 5,
                  "--npz", npz, "--picture", picture)  # fmt: skip
    assert (told["classes"], told["train_images"], told["val_images"]) == (3, 36, 12)
    assert told["random_init"] is False and told["baseline"]["random_init"] is True
    with np.load(npz, allow_pickle=False) as held:
        arrays = dict(held)
    assert arrays["classes"].tolist() == ["digit0", "digit1", "digit2"]
    assert str(arrays["model"]) == "metala_nano"
    assert arrays["train_names"][0] == str(digit_tree / "train/digit0/00.png")
    assert arrays["val_features"].shape == (12, 128) and arrays["val_names"].shape == (12,)
    assert arrays["train_features"].dtype == np.float32 and len(arrays["train_labels"]) == 36
    train, val = arrays["train_features"], arrays["val_features"]
    cosine = val / np.linalg.norm(val, axis=1, keepdims=True)
    cosine = cosine @ (train / np.linalg.norm(train, axis=1, keepdims=True)).T
    for own in told["knn"]:
        right = 0
        for row, label in zip(cosine, arrays["val_labels"], strict=True):
            best = np.argsort(-row)[: own["k"]]
            weights = np.exp(row[best] / 0.07)
            votes = np.bincount(arrays["train_labels"][best], weights, minlength=3)
            right += votes.argmax() == label
        assert own["top1"] == pytest.approx(100 * right / 12) and own["top5"] >= own["top1"]
    probe = told["probe"]
    with Image.open(picture) as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    lines = capsys.readouterr().out.splitlines()
    before = told["baseline"]
    assert lines[-1] == (
        f"top-1 kNN {told['knn'][1]['top1']:.2f} %, linear probe {probe['top1']:.2f} % (before "
        f"training kNN {before['knn'][1]['top1']:.2f} %, linear probe "
        f"{before['probe']['top1']:.2f} %) on 12 held-out images of 3 classes"
    )
    flags = ["--data-dir", digit_tree, "--random-init", "--k", 3, 5, "--no-probe"]
    assert judged(tmp_path, "metala_nano", *flags) == {
        k: x for k, x in before.items() if k != "probe"
    }


def test_sources_and_classes_are_those_of_training(tmp_path, capsys):
    flags = ["--dataset", "digits", "--class-range", 3, 5, "--val-fraction", 0.5, "--no-probe"]
    told = judged(tmp_path, "metala_nano", "--random-init", *SMALL, *flags, "--k", 1)
    config = DataConfig(dataset="digits", class_range=(3, 5), val_fraction=0.5)
    split = find_split(config)
    assert told["val_images"] == len(split.val_indices) and told["classes"] == 2
    labels = load_digits().target
    assert told["train_images"] + told["val_images"] == ((labels == 3) | (labels == 4)).sum()
    assert "probe" not in told and told["channels"] == 32
    assert capsys.readouterr().out.splitlines()[-1].startswith("top-1 kNN ")


def test_unreadable_images_are_left_out(own_digit_tree, tmp_path, capsys):
    bad = [own_digit_tree / "train/digit1/03.png", own_digit_tree / "val/digit2/14.png"]
    for path in bad:
        path.write_bytes(b"")
    flags = ["metala_nano", "--data-dir", own_digit_tree, "--k", 5, "--no-probe", "--baseline"]
    npz = tmp_path / "f.npz"
    told = judged(tmp_path, *flags, "--max-unreadable", 0.1, "--npz", npz)
    assert (told["train_images"], told["val_images"], told["unreadable"]) == (35, 11, 2)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("cannot read image ")]
    assert len(lines) == 2 and all(f" {p}: " in x for p, x in zip(bad, lines, strict=True))
    with np.load(npz) as held:
        assert not {*map(str, bad)} & {*held["train_names"], *held["val_names"]}
        assert held["train_labels"].tolist() == [0] * 12 + [1] * 11 + [2] * 12
    assert main(["features", *map(str, flags), "--workers", "0"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "1 of 36 training images cannot be read, more than" in error[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: model"),
        (["metala_nan"], "no timm model; did you mean metala_nano?"),
        (["lru_nano"], "no weights for lru_nano in this package"),
        (["metala_nano", "--data-dir", "nowhere"], "data folder nowhere does not exist"),
        (["metala_nano", "--dataset", "digit"], "data.dataset='digit' does not fit: "),
        (["metala_nano", "--val-fraction", "2"], "data.val_fraction='2' does not fit: "),
        (["metala_nano", "--class-range", "0", "9"], "data.class_range=0 9: there are 3 classes"),
        (["metala_nano", "--lr", "1"], "unrecognized arguments: --lr 1"),
        (["metala_nano", "--k", "0"], "--k needs 1 or more, got 0"),
        (["metala_nano", "--k", "5", "37"], "--k 37: there are 36 training images"),
        (["metala_nano", "--npz", "x.npy"], "--npz must end in .npz, got x.npy"),
        (["metala_nano", "--npz", "no/x.npz"], "cannot write no/x.npz: No such file"),
        (["metala_nano", "--picture", "x"], "--picture must end in one of .png .pdf .svg, got x"),
        (["metala_nano", "--json", "x.png", "--picture", "x.png"], "--picture x.png is --json too"),
        (["metala_nano", "--random-init", "--baseline"], "are the same weights; drop one"),
        (["metala_nano", "--model-kwargs", "img_size=32"], "--model-kwargs takes no img_size"),
        (["metala_nano", "--model-kwargs", "depth"], "--model-kwargs takes key=value, got 'depth'"),
        (["metala_nano", "--model-kwargs", "width=3"], "cannot load metala_nano: "),
        (["metala_nano", "--model-kwargs", "global_pool=''", "--random-init", "--k", "2"],
         "gives no pooled features"),
    ],
    ids=lambda x: " ".join(x)[12:50] if isinstance(x, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line(flags, message, digit_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    where = [] if "--data-dir" in flags else ["--data-dir", str(digit_tree)]
    assert main(["features", *flags, *where, "--workers", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.iterdir())  # nothing is left behind
