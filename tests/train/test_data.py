"""Corpus, infilling transform and packing: what reaches a training step."""

from itertools import islice

import numpy as np
import pytest

from mlx_codellama.errors import ConfigError
from mlx_codellama.prompts import infill_ids
from mlx_codellama.tokenizer import train_tokenizer
from mlx_codellama.train.corpus import read_corpus, windows
from mlx_codellama.train.infilling import document_ids, split, training_ids
from mlx_codellama.train.packing import pack, packed

TEXTS = [f"def f{i}(a, b):\n    return a * {i} + b\n\n\nclass C{i}:\n    x = [{i}]\n" * 3 for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=330)


@pytest.fixture
def folder(tmp_path):
    for i, text in enumerate(TEXTS):
        path = tmp_path / ("test" if i % 3 == 0 else "lib") / f"m{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_file_is_held_out_whole_and_by_its_name(folder):
    corpus = read_corpus(folder, hold_out_one_in=5)
    assert len(corpus.train) + len(corpus.held_out) == 60
    assert 3 <= len(corpus.held_out) <= 25  # 12 expected, deviation 3
    held_out = {d.name for d in corpus.held_out}
    (folder / "lib" / "another.py").write_text(TEXTS[0])
    again = read_corpus(folder, hold_out_one_in=5)
    assert held_out <= {d.name for d in again.held_out}
    assert again.digest != corpus.digest


def test_of_few_files_one_is_held_out_all_the_same(tmp_path):
    for n in range(23):
        (tmp_path / f"m{n}.py").write_text(TEXTS[n])
    corpus = read_corpus(tmp_path)
    assert (len(corpus.train), len(corpus.held_out)) == (22, 1)
    assert corpus.held_out[0] not in corpus.train
    assert read_corpus(tmp_path).held_out == corpus.held_out


def test_tables_foreign_encodings_and_excluded_folders_are_left_out(folder):
    (folder / "lib" / "table.py").write_text("x = '" + "a" * 600 + "'\n")
    (folder / "lib" / "latin.py").write_bytes(b"# caf\xe9\n" * 20)
    names = {d.name for part in (read_corpus(folder, exclude=("test",)),) for d in part.train + part.held_out}
    assert names == {f"lib/m{i}.py" for i in range(60) if i % 3}


def test_an_empty_folder_is_an_error_with_a_hint(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_corpus(tmp_path)
    assert ".py" in error.value.hint


def test_windows_are_whole_lines_and_lighter_files_are_read_less(folder):
    corpus = read_corpus(folder, lighter=("test",))
    texts = {d.text: d.weight for d in corpus.train}
    light = 0
    pieces = windows(corpus.train, np.random.default_rng(0), shortest=20, longest=90)
    for piece, ends in islice(pieces, 600):
        source = next(t for t in texts if piece in t)
        assert piece.endswith("\n")
        assert ("\n" + piece) in ("\n" + source)
        assert not ends or source.endswith(piece)
        light += texts[source] != 1.0
    # a third of the files at a third of the weight: 1/7 of the draws, 86 ± 8.6; 120 is four deviations away
    assert 50 < light < 120


def test_split_is_uniform_over_borders_and_loses_nothing():
    rng, text = np.random.default_rng(1), "abc"
    seen = [split(text, rng) for _ in range(4000)]
    assert all("".join(parts) == text for parts in seen)
    # 16 ordered pairs of borders; the unordered pair (0, 3) has probability 2/16, i.e. 500 ± 21
    assert 400 < sum(middle == text for _, middle, _ in seen) < 600
    assert 150 < sum(prefix == text for prefix, _, _ in seen) < 350  # (3, 3): 250 ± 15


@pytest.mark.parametrize("order", ["psm", "spm"])
@pytest.mark.parametrize("parts", [("def f(", "a, b", "):\n"), ("", "x = 1", ""), ("  y", "", " z"), ("é", "漢", "🙂")])
def test_training_ids_begin_as_the_inference_prompt_does(tokenizer, order, parts):
    """What the model sees in training before the middle is, id for id, what `infill` will send."""
    prefix, middle, suffix = parts
    ids = training_ids(tokenizer, prefix, middle, suffix, order=order)
    assert ids[-2:] == [tokenizer.infill.eot, tokenizer.eos_id]
    if order == "psm":
        prompt = infill_ids(tokenizer, prefix, suffix, order=order)
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode_infilling(ids[len(prompt) : -2]) == middle
    else:  # prefix and middle are one text, so only the part up to MID is the prompt's
        head = infill_ids(tokenizer, "", suffix, order=order)
        assert ids[: len(head)] == head
        assert tokenizer.decode(ids[len(head) : -2]) == prefix + middle


def test_nine_documents_in_ten_are_transformed(tokenizer):
    rng = np.random.default_rng(2)
    made = [document_ids(tokenizer, "x = 1\n", rng, ends=True) for _ in range(1000)]
    psm = sum(ids[1] == tokenizer.infill.pre and ids[2] != tokenizer.infill.suf for ids in made)
    plain = [ids for ids in made if ids[1] != tokenizer.infill.pre]
    assert 60 < len(plain) < 140  # 100 ± 9.5
    assert all(ids == tokenizer.encode("x = 1\n", bos=True, eos=True) for ids in plain)
    assert 275 < psm < 390  # 450 less the 26 % with an empty prefix, which look like SPM: 331 ± 15


def read(batch):
    """The documents' pieces, each with the token after it."""
    ends = np.cumsum(batch.lengths).tolist()
    assert ends[-1] == len(batch.ids) == len(batch.targets) == batch.n_targets
    pieces = []
    for length, end in zip(batch.lengths, ends, strict=True):
        ids, targets = batch.ids[end - length : end].tolist(), batch.targets[end - length : end].tolist()
        assert ids[1:] == targets[:-1]  # never the next document's
        pieces.append([*ids, targets[-1]])
    return pieces


def test_packing_places_whole_documents_and_never_predicts_the_next_one():
    rng = np.random.default_rng(3)
    documents = [[1, *rng.integers(3, 50, size=n).tolist(), 2] for n in rng.integers(0, 30, size=200)]
    batch = pack(iter(documents), n_tokens=200, longest=40)
    assert 180 < len(batch.ids) <= 200
    assert batch.n_dropped == 0
    placed = read(batch)
    assert len(placed) > 8
    assert all(ids in documents for ids in placed)


def test_a_long_document_goes_on_in_the_next_piece_and_none_of_it_is_lost():
    """A thousand tokens in rows of 64 lost 936 once."""
    document = list(range(1000))
    whole = pack([document], n_tokens=1024, longest=64)
    assert whole.lengths == (*[64] * 15, 39)
    assert (whole.ids.tolist(), whole.targets.tolist()) == (document[:-1], document[1:])
    assert whole.n_dropped == 0
    assert pack([document], n_tokens=64, longest=64).n_dropped == 935


@pytest.mark.parametrize(("n_tokens", "longest"), [(64, 64), (100, 30), (7, 9), (500, 64)])
def test_batches_carry_over_what_does_not_fit(n_tokens, longest):
    rng, documents, at = np.random.default_rng(5), [], 0
    for n in [1000, 1, 2, 70, *rng.integers(0, 120, size=60).tolist()]:
        documents.append(list(range(at, at + n)))
        at += n
    batches = list(packed(iter(documents), n_tokens=n_tokens, longest=longest))
    assert all(0 < len(batch.ids) <= n_tokens and max(batch.lengths) <= longest for batch in batches)
    assert sum(batch.n_dropped for batch in batches) == 0
    targets = [id for batch in batches for piece in read(batch) for id in piece[1:]]
    assert sorted(targets) == [id for ids in documents for id in ids[1:]]


def test_no_documents_make_no_batch():
    assert list(packed([[], [5]], n_tokens=9, longest=9)) == []
    assert pack([], n_tokens=9, longest=9).n_targets == 0
