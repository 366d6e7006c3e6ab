"""The linear probe beside scikit-learn's LogisticRegression: seconds, the penalty that was chosen, accuracy.

    python benchmarks/probe.py [--repeats 3]

Both use the same standardized vectors, the same inner split, the same six penalties and one thread, and both start each
fit from the previous one. Vectors have directions of very different widths and a large common one, as embeddings do.
Ratios of times in one process carry over to other machines; seconds do not.
"""

import argparse
import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits

from audiomaepp.evaluate import _inner_split, fit_probe, standardize

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
SIZES = ((320, 256, 10, 0.25), (2000, 512, 50, 0.2), (320, 3072, 10, 0.12))  # clips, dimensions, classes, gap


def vectors(clips, dim, classes, gap, seed):
    "Training and held-out vectors (a quarter more), whose directions decay as a power law, and their classes."
    rng = np.random.default_rng(seed)
    y = np.arange(clips * 5 // 4) % classes
    x = gap * rng.normal(size=(classes, dim))[y] + rng.normal(size=(len(y), dim))
    x = x * np.arange(1, dim + 1) ** -0.5 @ np.linalg.qr(rng.normal(size=(dim, dim)))[0] + 5 * rng.normal(size=dim)
    return x[:clips], y[:clips], x[clips:], y[clips:]


def ours(train_x, train_y, test_x):
    "Return the penalty and the predictions of `fit_probe`."
    probe = fit_probe(train_x, train_y)
    return probe.l2, probe.predict(test_x)


def theirs(train_x, train_y, test_x):
    "Return the penalty and the predictions of LogisticRegression under the same rule."
    train_x, test_x = (x.astype(np.float64) for x in standardize(train_x, test_x))
    aside, tried = _inner_split(torch.from_numpy(train_y)).numpy(), {}
    model = LogisticRegression(max_iter=1000, tol=1e-4, warm_start=True)
    for l2 in PENALTIES:
        model.set_params(C=1 / ((~aside).sum() * l2)).fit(train_x[~aside], train_y[~aside])
        tried[l2] = log_loss(train_y[aside], model.predict_proba(train_x[aside]))
        if tried[l2] > min(tried.values()):
            break
    l2 = min(tried, key=tried.get)
    return l2, model.set_params(C=1 / (len(train_x) * l2), tol=1e-5).fit(train_x, train_y).predict(test_x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="data sets of each size; the median is printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'clips':>6}{'dims':>6}{'classes':>9}{'ours, s':>10}{'ratio':>8}{'accuracy, ours':>16}{'theirs':>9}")
    with threadpool_limits(1):
        for read in (ours, theirs):  # the first call imports and compiles
            read(*vectors(80, 16, 4, 0.5, 0)[:3])
        for *size, gap in SIZES:
            seconds, right = {ours: [], theirs: []}, {ours: [], theirs: []}
            for seed in range(args.repeats):
                *data, truth = vectors(*size, gap, seed)
                for read in (ours, theirs):
                    tick = time.perf_counter()
                    l2, predicted = read(*data)
                    seconds[read].append(time.perf_counter() - tick)
                    right[read].append(np.mean(predicted == truth))
            ratio = np.median(np.divide(seconds[theirs], seconds[ours]))
            print(f"{size[0]:6}{size[1]:6}{size[2]:9}{np.median(seconds[ours]):10.2f}{ratio:8.2f}"
                  f"{np.mean(right[ours]):16.3f}{np.mean(right[theirs]):9.3f}")


if __name__ == "__main__":
    main()
