"""Logits and labels → Accuracy, AUC and macro F1."""

import math

from torch import Tensor


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores of the prediction "1 where the logit is above 0".

    Args:
        logits: (N,).
        labels: (N,), 0 or 1.

    Returns:
        "Accuracy", "AUC" (nan if only one label occurs) and "F1_macro", each 0 to 1.
    """
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score  # a second to import

    logits, labels = logits.cpu().numpy(), labels.cpu().numpy()
    predictions = logits > 0
    one_label = labels.min() == labels.max()
    return {
        "Accuracy": float(accuracy_score(labels, predictions)),
        "AUC": math.nan if one_label else float(roc_auc_score(labels, logits)),
        "F1_macro": float(f1_score(labels, predictions, average="macro", zero_division=0)),
    }
