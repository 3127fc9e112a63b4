"""Golden checks of `evals.vqa`: scores of MMVP-VLM, MMVP and POPE from features and answers."""

from __future__ import annotations

import json

import numpy as np

from perception_jax.evals.vqa import judging, mmvp, mmvp_vlm, pope
from tests.parity.cases import Case, assert_close, check


@check("mmvp_mof", when=lambda case: case.name.startswith("mmvp_vlm_scoring"))
def mmvp_vlm_scoring(case: Case) -> None:
    settings, arrays = case.settings, case.arrays
    assert settings["text_prefix"] == mmvp_vlm.PREFIX
    assert (settings["threshold"], settings["threshold_comparison"]) == (0.5, "greater")
    assert settings["tie_prediction"] == "img2"
    assert settings["ground_truth_rule"] == "odd_qid_is_img1"
    assert settings["category_from"] == "pair_position"
    rows = arrays["row_qid"][: 2 * settings["num_pairs"]].reshape(-1, 2)
    images, texts = (arrays[f"{name}_features"][rows - 1] for name in ("image", "text"))
    found = mmvp_vlm.score(
        rows.tolist(), mmvp_vlm.cosines_of(images, texts), float(arrays["logit_scale"])
    )
    result = json.loads((case.directory / "result.json").read_text())
    for k in (1, 2):
        column = (..., k - 1)
        np.testing.assert_array_equal(found.ids[column], arrays[f"qid{k}"])
        np.testing.assert_array_equal(found.chosen_first[column], arrays[f"pred{k}_is_img1"])
        np.testing.assert_array_equal(found.right_first[column], arrays[f"gt{k}_is_img1"])
        assert_close(found.share[column], arrays[f"q{k}score"], what=f"q{k}score")
    assert np.all(found.share[settings["tied_pairs"]] == 0.5)
    scale = settings["accuracy_scale"]
    assert list(found.accuracy) == result["categories"]
    accuracy = scale * np.array([*found.accuracy.values()])
    assert_close(accuracy, arrays["category_accuracy"], what="accuracy")
    assert found.output_csv().splitlines()[0] == ",".join(result["header"])


@check("mmvp_mof", when=lambda case: case.name.startswith("mmvp_pair_grading"))
def mmvp_pair_grading(case: Case) -> None:
    grading = json.loads((case.directory / "grading.json").read_text())
    requests = mmvp.grading_requests(grading["records"])
    assert [one.body for one in requests] == grading["requests"]
    assert requests[0].body["model"] == judging.MODEL
    grades = [mmvp.grade_of_reply(reply) for reply in grading["grader_replies"]]
    assert grades == grading["grades"]
    scores = mmvp.pair_scores([grade == "yes" for grade in grades])
    np.testing.assert_array_equal(scores.right[: len(case.arrays["is_yes"])], case.arrays["is_yes"])
    assert (int(scores.pairs.sum()), len(scores.pairs)) == (
        grading["num_correct"],
        grading["num_total"],
    )
    assert scores.pair_accuracy == grading["accuracy"] == float(case.arrays["accuracy"])
    assert scores.printed() == grading["stdout"]


@check("mmvp_mof", when=lambda case: case.name.startswith("pope_eval"))
def pope_eval(case: Case) -> None:
    given = json.loads((case.directory / "pope.json").read_text())
    decoded = ["yes" if pope.decode(text) else "no" for text in given["answers"]]
    assert decoded == given["decoded"]
    found = pope.score(given["answers"], given["labels"])
    counts = (
        *(found.true_positive, found.false_positive),
        *(found.true_negative, found.false_negative),
    )
    assert counts == tuple(case.arrays["tp_fp_tn_fn"].tolist())
    metrics = (found.accuracy, found.precision, found.recall, found.f1, found.yes_ratio)
    np.testing.assert_array_equal(metrics, case.arrays["metrics"])
    assert found.printed() == given["stdout"]
