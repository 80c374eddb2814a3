"""Baseline: TF-IDF and a linear support vector machine on everybody's training records."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from intramural.core.federation import FederationConfig
from intramural.core.metrics import Sums
from intramural.data.records import Record
from intramural.server.report import result_of


def linear_baseline(
    federation: FederationConfig,
    train: Sequence[Record],
    tests: dict[str, Sequence[Record]],
) -> dict[str, Any]:
    """Return `{"all": metrics, "own": {site: metrics}}` of the baseline on the test records.

    Word unigrams and bigrams, sublinear term frequency, C = 1: scikit-learn's common setting, not
    tuned. It has no loss, so none is reported.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(vectorizer, LinearSVC(random_state=0))
    model.fit([r.text for r in train], [r.target for r in train])
    classes = {label: index for index, label in enumerate(federation.task.labels)}

    def result(records: Sequence[Record]) -> dict[str, Any]:
        count = len(classes)
        truth = np.array([classes[r.target] for r in records])
        guess = np.array([classes[g] for g in model.predict([r.text for r in records])])
        confusion = np.bincount(truth * count + guess, minlength=count * count)
        sums = {"confusion": confusion, "loss": np.zeros(1), "examples": np.array([len(truth)])}
        metrics = result_of(
            federation, Sums(counts={name: n.astype(np.int64) for name, n in sums.items()})
        )
        del metrics["loss"]
        return metrics

    everything = [record for records in tests.values() for record in records]
    return {"all": result(everything), "own": {site: result(r) for site, r in tests.items()}}
