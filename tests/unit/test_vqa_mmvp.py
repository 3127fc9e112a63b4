"""MMVP and MMVP-VLM: reading the files, asking, grading by rule and by a judge, scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from perception_jax.errors import DataError
from perception_jax.evals.vqa import asking, judging, mmvp, mmvp_vlm

OPEN = {"a": "Open", "b": "Closed"}
ROWS = (
    "Are the wings open?,(a) Open (b) Closed,(a)",
    "Are the wings open?,(a) Open (b) Closed,(b)",
    '"A dog, or a cat?",(a) Dog (b) Cat,(b)',
    '"A dog, or a cat?",(a) Dog (b) Cat,(a)',
)


def write_mmvp(folder, header="Index,Question,Options,Correct Answer", rows=ROWS):
    lines = [header, *(f"{k},{row}" for k, row in enumerate(rows, 1))]
    folder.mkdir(exist_ok=True)
    (folder / "Questions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # 1. A letter at the beginning.
        ("(a) Open", "a"),
        ("  (B)", "b"),
        ('"(b) Closed"', "b"),
        ("a", "a"),
        ("B.", "b"),
        ("b) closed", "b"),
        ("A: it is open", "a"),
        ("b closed", "b"),
        ("(a), not (b)", "a"),
        # 2. One letter in brackets further on.
        ("The answer is (b).", "b"),
        ("It is (b), yes (b).", "b"),
        # 3. The text of one option.
        ("A butterfly whose wings are open.", "a"),
        ("They are CLOSED!", "b"),
        ("open", "a"),
        # 4. Undecided.
        ("a butterfly", None),
        ("Either (a) or (b)", None),
        ("Neither open nor closed", None),
        ("They are opened", None),
        ("", None),
    ],
)
def test_the_rule_decides_by_the_first_that_applies(response, expected):
    assert mmvp.decode(response, OPEN) == expected


def test_options_come_from_their_column_or_from_a_prompt():
    assert mmvp.options_of("(a) Open (b) Closed") == OPEN
    assert mmvp.options_of("Are they open? (a) Open  (b) Closed") == {"a": "Open", "b": "Closed"}
    assert mmvp.options_of("(a) 2 (two) (b) 3") == {"a": "2 (two)", "b": "3"}
    assert mmvp.decode("It says 'no.'", {"a": "Yes.", "b": "No."}) == "b"
    assert mmvp.decode("something", {"a": "", "b": "?"}) is None


def test_a_graded_row_needs_the_right_letter():
    row = {"prompt": "Q? (a) Open (b) Closed", "answer": "(b)", "response": "closed"}
    assert mmvp.grade_by_rule(row)
    assert not mmvp.grade_by_rule({**row, "response": "open"})
    assert not mmvp.grade_by_rule({**row, "response": "no idea"})


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("yes", "yes"), ("YES", "yes"), ("No", "no"), ("yes\n", "yes\n")]
    + [(text, mmvp.UNDETERMINED) for text in ("Yes.", "yes ", "", "yes\n\n", "yes no")],
)
def test_a_judges_reply_is_one_bare_word(reply, grade):
    assert mmvp.grade_of_reply(reply) == grade


def test_the_header_may_be_spelled_in_any_way(tmp_path):
    for header in (
        "Index,Question,Options,Correct Answer",
        "lndex,Question,Options,Correct Answer",
        "\ufeffindex, question ,OPTIONS,correct answer",
    ):
        found = mmvp.read_questions(write_mmvp(tmp_path, header))
        assert [one.number for one in found] == [1, 2, 3, 4]
        assert found[2].prompt == "A dog, or a cat? (a) Dog (b) Cat"
        assert [one.answer for one in found] == ["(a)", "(b)", "(b)", "(a)"]


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        ("Index,Question,Options", ("Q,(a) x (b) y",), "Questions.csv:1: expected the columns"),
        ("Index,Question,Options,Correct Answer", (), "expected rows"),
        ("Index,Question,Options,Correct Answer", ("Q,(a) x (b) y,(c)",), "csv:2: Correct Answer"),
        ("Index,Question,Options,Correct Answer", ("Q, or not?,x,(a)",), "csv:2: expected 4 cells"),
    ],
)
def test_a_damaged_table_is_named_with_its_line(tmp_path, header, rows, words):
    with pytest.raises(DataError, match=words):
        mmvp.read_questions(write_mmvp(tmp_path, header, rows))


def test_corrected_labels_are_exchanged_in_two_pairs(tmp_path):
    root = write_mmvp(tmp_path, rows=ROWS[:2] * 150)
    original, corrected = mmvp.read_questions(root), mmvp.read_questions(root, corrected=True)
    changed = [
        one.number for one, two in zip(original, corrected, strict=True) if one.answer != two.answer
    ]
    assert changed == [99, 100, 279, 280]
    assert corrected[98].answer == "(b)"
    with pytest.raises(DataError, match="280 rows"):
        mmvp.read_questions(write_mmvp(tmp_path), corrected=True)


def test_pairs_count_only_if_both_are_right():
    scores = mmvp.pair_scores([True, True, True, False, True])
    assert scores.pairs.tolist() == [True, False]
    assert (scores.pair_accuracy, scores.question_accuracy) == (0.5, 0.8)
    assert scores.to_dict()["pairs"] == 2
    with pytest.raises(DataError, match="at least two"):
        mmvp.pair_scores([True])


def test_accuracy_by_pattern_is_in_the_papers_order(tmp_path):
    scores = mmvp.pair_scores([True, True, False, True, True, True])
    names = ["Text", "own pattern", mmvp.PATTERNS[0]]
    found = mmvp.by_pattern(scores, names)
    assert found == {mmvp.PATTERNS[0]: 1.0, "Text": 1.0, "own pattern": 0.0}
    assert list(found) == [mmvp.PATTERNS[0], "Text", "own pattern"]
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(names))
    assert mmvp.read_patterns(path, 3) == tuple(names)
    with pytest.raises(DataError, match="each of 4 pairs, found 3"):
        mmvp.read_patterns(path, 4)
    with pytest.raises(DataError, match="each of 3 pairs, found 2"):
        mmvp.by_pattern(scores, names[:2])


def test_pearson_is_numpys_and_refuses_constants():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 9))
    np.testing.assert_allclose(mmvp.pearson(x, y), np.corrcoef(x, y)[0, 1], rtol=1e-12)
    with pytest.raises(DataError, match="constant"):
        mmvp.pearson(x, np.ones(9))
    with pytest.raises(DataError, match="9 and 8"):
        mmvp.pearson(x, y[:8])


# --- Asking --------------------------------------------------------------------------------------


def test_asking_goes_on_where_it_stopped_and_writes_the_authors_file(tmp_path):
    root = write_mmvp(tmp_path / "data")
    with pytest.raises(DataError, match="one of the folders 'MMVP Images'"):
        mmvp.to_ask(root, mmvp.read_questions(root))
    (root / "MMVP_Images").mkdir()
    questions = mmvp.read_questions(root)
    asked, calls = mmvp.to_ask(root, questions), []
    assert asked[2].image.name == "3.jpg"

    def answer(image, prompt):
        calls.append((image.name, prompt))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return f"({'ab'[len(calls) % 2]})"

    ask = asking.one_by_one(answer)
    with pytest.raises(KeyboardInterrupt):
        asking.ask(asked, ask, tmp_path / "out", model="m", settings=mmvp.GREEDY)
    found = asking.ask(asked, ask, tmp_path / "out", model="m", settings=mmvp.GREEDY)
    assert [name for name, _ in calls] == ["1.jpg", "2.jpg", "3.jpg", "3.jpg", "4.jpg"]
    assert [one.output for one in found] == ["(b)", "(a)", "(a)", "(b)"]
    path = asking.write_lines(
        tmp_path / "answers.jsonl", mmvp.answer_rows(questions, found, model="m")
    )
    keys = ["question_id", "prompt", "answer", "response", "answer_id", "model_id"]
    assert list(json.loads(path.read_text().splitlines()[0])) == keys
    rows = mmvp.read_answers(path)
    assert [row["question_id"] for row in rows] == [1, 2, 3, 4]
    assert len({row["answer_id"] for row in rows}) == 4
    # Other settings are another run.
    with pytest.raises(DataError, match="holds predictions of 'm#"):
        asking.ask(asked, ask, tmp_path / "out", model="m", settings=mmvp.REFERENCE)
    with pytest.raises(DataError, match="expected the answers to questions 1 to 2"):
        mmvp.with_labels(rows, questions[:2])


def test_the_references_way_of_asking_is_sampled_and_the_other_is_not():
    assert (
        asking.Decoding(
            template="llava_v1", temperature=0.2, top_k=50, max_tokens=1024, image_mode="hf_crop"
        )
        == mmvp.REFERENCE
    )
    assert (mmvp.GREEDY.temperature, mmvp.GREEDY.top_k) == (0.0, None)


# --- Requests and replies ------------------------------------------------------------------------


def test_requests_and_replies_go_through_files(tmp_path):
    row = {"question_id": 7, "prompt": "P", "answer": "(a)", "response": "R"}
    requests = mmvp.grading_requests([row, {**row, "question_id": 8}])
    path = judging.write_requests(tmp_path / "requests.jsonl", requests)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["7", "8"]
    assert lines[0]["url"] == "/v1/chat/completions"
    assert lines[0]["body"]["messages"][1]["content"].endswith("answer:R?")
    batch = {"body": {"choices": [{"message": {"content": "no"}}]}}
    replies = tmp_path / "replies.jsonl"
    replies.write_text(
        json.dumps({"custom_id": "8", "response": batch})
        + "\n"
        + json.dumps({"custom_id": "7", "reply": "yes"})
    )
    assert judging.read_replies(replies, ["7", "8"]) == ["yes", "no"]
    with pytest.raises(DataError, match="1 without one"):
        judging.read_replies(replies, ["7", "8", "9"])
    with pytest.raises(DataError, match="1 of other requests"):
        judging.read_replies(replies, ["7"])
    replies.write_text(json.dumps({"custom_id": "7", "response": {"body": {"choices": []}}}))
    with pytest.raises(DataError, match="object 1: expected a choice"):
        judging.read_replies(replies, ["7"])


# --- MMVP-VLM ------------------------------------------------------------------------------------


def write_vlm(folder, pairs=9, images="MLLM_VLM Images"):
    lines = ["Question ID,Type,Statement"]
    lines += [f'{k},Kind {(k - 1) // 2},"statement {k}, quoted"' for k in range(1, 2 * pairs + 1)]
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / "Questions.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("name", ["MLLM_VLM Images", "MMVP_VLM_Images"])
def test_the_folder_of_images_has_one_of_several_names(tmp_path, name):
    write_vlm(tmp_path, images=name)
    pairs = mmvp_vlm.read_pairs(tmp_path)
    assert pairs[1].ids == (3, 4)
    assert pairs[1].texts[0] == "a photo of statement 3, quoted"
    assert pairs[1].images[1] == tmp_path / name / "Kind 1" / "4.jpg"


def test_an_unpaired_row_is_left_out_and_paths_stay_inside(tmp_path):
    write_vlm(tmp_path)
    table = tmp_path / "Questions.csv"
    table.write_text(table.read_text() + "\n19,Kind,alone")
    assert len(mmvp_vlm.read_pairs(tmp_path)) == 9
    table.write_text("Question ID,Type,Statement\n1,../..,x\n2,../..,y\n")
    with pytest.raises(DataError, match=r"Questions.csv:2: expected a folder's name"):
        mmvp_vlm.read_pairs(tmp_path)
    table.write_text("Question ID,Type,Statement\none,Kind,x\n2,Kind,y\n")
    with pytest.raises(DataError, match="expected a whole number as id, found 'one'"):
        mmvp_vlm.read_pairs(tmp_path)


def test_pairs_are_scored_by_the_parity_of_ids_and_ties_choose_the_second_image():
    ids = [(2 * k + 1, 2 * k + 2) for k in range(18)]
    right = np.tile(np.array([[[0.3, 0.2], [0.2, 0.3]]]), (18, 1, 1))
    right[1] = 0.25  # a tie chooses the second image: the first statement is wrong
    right[2] = right[2][::-1]
    ids[4] = (10, 9)  # counted by parity: both choices are wrong
    found = mmvp_vlm.score(ids, right, logit_scale=4.6)
    assert np.flatnonzero(~found.correct).tolist() == [1, 2, 4]
    assert list(found.accuracy.values()) == [0.5, 0.5, 0.5, *[1.0] * 6]
    assert found.mean == pytest.approx(7.5 / 9)
    lines = found.output_csv().splitlines()
    assert lines[0] == "qid1,qid2,pred1,pred2,gt1,gt2,q1score,q2score"
    assert lines[2].startswith("3,4,img2,img2,img1,img2,0.5,0.5")
    with pytest.raises(DataError, match="at least 9 pairs"):
        mmvp_vlm.score(ids[:3], right[:3], 1.0)
    right[5, 0, 0] = np.nan
    with pytest.raises(DataError, match="others in pair 5"):
        mmvp_vlm.score(ids, right, 1.0)
