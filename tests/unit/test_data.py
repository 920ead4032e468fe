"""Data: sources, tokenizers, packing, the validation split and the cache."""

import json
import os
import pickle
import threading
import time

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from eadt.config.training import TrainingConfig
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.training import hub
from eadt.training.data import check_dataset, open_prepared, prepare_dataset, sources
from eadt.training.data.store import META_NAME, TRAIN_NAME, VALIDATION_NAME
from eadt.training.tokenizer import ByteTokenizer, HfTokenizer, load_tokenizer

EOS = 256
LENGTH = 16


def training(**changes):
    values = {
        "model_config": {"model_type": "gpt_neox"},
        "tokenizer_name_or_path": "byte",
        "sequence_length": LENGTH,
    }
    return TrainingConfig.model_validate(
        values | {key: str(v) if key == "dataset_path" else v for key, v in changes.items()}
    )


def write_documents(folder, count=200, words=30):
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04d}.txt").write_text(f"document {number} " * words)
    return folder


def text_of(sequences):
    return [ByteTokenizer().decode(row) for row in sequences]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No network and an empty cache, whatever this machine has."""
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "datasets.config.HF_DATASETS_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / "empty-cache"))


def test_documents_are_packed_end_to_end_without_loss(tmp_path):
    (tmp_path / "a.txt").write_text("first" * 7)
    (tmp_path / "b.txt").write_text("zweiter ü" * 5)
    prepared = prepare_dataset(
        training(dataset_path=tmp_path, validation_fraction=0), tmp_path / "cache", seed=0
    )
    expected = [*("first" * 7).encode(), EOS, *("zweiter ü" * 5).encode(), EOS]
    found = open_prepared(prepared.path).train.batch(range(prepared.num_train_sequences))
    assert found.shape == (len(expected) // LENGTH, LENGTH)
    assert found.dtype == np.int64
    assert found.ravel().tolist() == expected[: found.size]
    assert prepared.num_validation_sequences == 0
    assert prepared.vocab_size == ByteTokenizer().vocab_size


def test_validation_holds_back_whole_documents_disjoint_and_by_seed(tmp_path):
    config = training(dataset_path=write_documents(tmp_path / "data"), validation_fraction=0.1)
    first = prepare_dataset(config, tmp_path / "cache", seed=1)
    other = prepare_dataset(config, tmp_path / "cache", seed=2)
    assert first.validation_from == "documents"
    total = first.num_train_sequences + first.num_validation_sequences
    assert 0.1 / 3 <= first.num_validation_sequences / total <= 0.3
    numbers = {}
    for name, rows in vars(open_prepared(first.path)).items():
        if name != "prepared":
            text = ByteTokenizer().decode(rows.batch(range(len(rows))).ravel())
            numbers[name] = {word for word in text.split() if word.isdigit()}
    assert len(numbers["train"] | numbers["validation"]) > 195
    # A document of more than one sequence appears whole on one side; only words cut at a row's end
    # could look like another number.
    assert not numbers["train"] & numbers["validation"]
    assert other.fingerprint != first.fingerprint
    assert other.content_fingerprint != first.content_fingerprint


def test_one_long_document_is_split_by_sequences(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(5000))))
    config = training(dataset_path=tmp_path / "a.txt", validation_fraction=0.05)
    prepared = prepare_dataset(config, tmp_path / "cache", seed=0)
    dataset = open_prepared(prepared.path)
    train, validation = text_of(dataset.train), text_of(dataset.validation)
    assert prepared.validation_from == "sequences"
    assert len(validation) == round(0.05 * (len(train) + len(validation)))
    assert not set(train) & set(validation)
    whole = (tmp_path / "a.txt").read_text()
    rows = [whole[i : i + LENGTH] for i in range(0, len(whole) - LENGTH + 1, LENGTH)]
    assert sorted(rows) == sorted(train + validation)


def test_large_text_files_are_read_in_pieces_as_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 100)
    text = "".join(f"line {number}\r\n" for number in range(300))
    (tmp_path / "a.txt").write_text(text, newline="")
    pieces = list(sources.open_source(training(dataset_path=tmp_path / "a.txt")).read())
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n") for piece in pieces)
    assert len(pieces) > 10


def test_json_lines_and_parquet_give_the_same_as_text(tmp_path):
    texts = [f"text {number} äöü\n" * 5 for number in range(20)]
    lines = "".join(json.dumps({"body": text, "other": 1}) + "\n\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    pyarrow.parquet.write_table(pyarrow.table({"body": [*texts, None]}), tmp_path / "a.parquet")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text)
    contents = {
        prepare_dataset(
            training(dataset_path=tmp_path / name, text_column="body"), tmp_path / "cache", 0
        ).content_fingerprint
        for name in ("a.jsonl", "a.parquet", "texts")
    }
    assert len(contents) == 1


def test_half_a_surrogate_pair_does_not_stop_the_preparation(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 40 + '\\ud800 end"}\n')
    (piece,) = sources.open_source(training(dataset_path=tmp_path / "a.jsonl")).read()
    assert piece.text.endswith("x? end")


def test_the_file_pattern_chooses_and_hidden_files_are_left_out(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("a.py", "sub/b.py", "sub/.git/c.py", ".d.py", "e.txt", "f.csv"):
        (tmp_path / name).write_text(name)
    found = sources.open_source(training(dataset_path=tmp_path, dataset_file_pattern="**/*.py"))
    assert [piece.text for piece in found.read()] == ["a.py", "sub/b.py"]
    plain = sources.open_source(training(dataset_path=tmp_path))
    assert [piece.text for piece in plain.read()] == ["e.txt"]
    assert "1 × .csv" in plain.notes[0]


def test_the_standard_library_is_a_bounded_deterministic_source():
    first, second = (sources.open_source(training(dataset_path="python-stdlib")) for _ in range(2))
    assert first.identity == second.identity
    assert 1_000_000 < first.num_bytes <= sources.STDLIB_MAX_BYTES
    names = [name for name, _ in first.identity[2]]
    assert not any(part in {"test", "tests", "site-packages"} for name in names for part in name.split("/"))
    assert sum("def " in piece.text for piece in first.read()) > 100


def test_a_second_call_reads_nothing(tmp_path, monkeypatch):
    config = training(dataset_path=write_documents(tmp_path / "data"))
    first = prepare_dataset(config, tmp_path / "cache", 0)
    monkeypatch.setattr(ByteTokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
    lines = []
    assert prepare_dataset(config, tmp_path / "cache", 0, lines.append) == first
    assert "found in the cache" in lines[-1]


def test_changed_files_and_settings_make_another_entry(tmp_path):
    folder = write_documents(tmp_path / "data")
    config = training(dataset_path=folder)
    entries = [prepare_dataset(config, tmp_path / "cache", 0)]
    entries.append(prepare_dataset(training(dataset_path=folder, sequence_length=32), tmp_path / "cache", 0))
    (folder / "0000.txt").write_text("changed")
    entries.append(prepare_dataset(config, tmp_path / "cache", 0))
    os.utime(folder / "0001.txt", ns=(1, 1))
    entries.append(prepare_dataset(config, tmp_path / "cache", 0))
    assert len({entry.fingerprint for entry in entries}) == 4
    assert entries[3].content_fingerprint == entries[2].content_fingerprint


@pytest.mark.parametrize("name", [TRAIN_NAME, VALIDATION_NAME, META_NAME])
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_torn_cache_is_found_and_made_anew(tmp_path, name, damage):
    config = training(dataset_path=write_documents(tmp_path / "data"))
    first = prepare_dataset(config, tmp_path / "cache", 0)
    rows = open_prepared(first.path).train.batch(range(first.num_train_sequences))
    if damage == "remove":
        (first.path / name).unlink()
    else:
        os.truncate(first.path / name, (first.path / name).stat().st_size - 7)
    with pytest.raises(EnvironmentFailure, match="no complete tokenised data set"):
        open_prepared(first.path)
    again = prepare_dataset(config, tmp_path / "cache", 0)
    assert again == first
    assert np.array_equal(open_prepared(again.path).train.batch(range(len(rows))), rows)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [first.fingerprint]


def test_preparers_at_the_same_time_agree(tmp_path, monkeypatch):
    config = training(dataset_path=write_documents(tmp_path / "data"))
    barrier = threading.Barrier(4)
    encode = ByteTokenizer.encode_batch

    def encode_together(self, texts):
        barrier.wait(timeout=30)  # proves that all four really tokenise: none found the cache
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", encode_together)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare_dataset(config, tmp_path / "cache", 0)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [found[0].fingerprint]
    open_prepared(found[0].path)


def test_an_interrupted_preparation_leaves_nothing_and_old_remains_are_removed(tmp_path, monkeypatch):
    config = training(dataset_path=write_documents(tmp_path / "data"))
    remains = tmp_path / "cache" / ".preparing-x"
    remains.mkdir(parents=True)
    os.utime(remains, (1, 1))
    recent = tmp_path / "cache" / ".preparing-y"
    recent.mkdir()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ByteTokenizer, "encode_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(config, tmp_path / "cache", 0)
    assert list((tmp_path / "cache").iterdir()) == [recent]


def test_an_opened_data_set_is_small_to_send_and_refuses_bad_indices(tmp_path):
    prepared = prepare_dataset(training(dataset_path=write_documents(tmp_path / "d")), tmp_path / "c", 0)
    dataset = open_prepared(prepared.path)
    assert dataset.train[3].shape == (LENGTH,)
    sent = pickle.dumps(dataset)
    assert len(sent) < 4000 < prepared.num_train_sequences * prepared.sequence_length
    assert np.array_equal(pickle.loads(sent).train[3], dataset.train[3])
    for index in (-1, len(dataset.train)):
        with pytest.raises(IndexError):
            dataset.train[index]


def test_a_data_set_must_fill_one_global_batch(tmp_path):
    prepared = prepare_dataset(training(dataset_path=write_documents(tmp_path / "d")), tmp_path / "c", 0)
    check_dataset(prepared, prepared.num_train_sequences)
    with pytest.raises(ConfigError, match="fewer than one global batch") as caught:
        check_dataset(prepared, prepared.num_train_sequences + 1)
    assert str(prepared.num_train_sequences) in caught.value.fix


def make_empty_folder(path):
    path.mkdir()


def make_folder_of_images(path):
    path.mkdir()
    (path / "a.png").write_bytes(b"x")


def make_empty_file(path):
    path.touch()


def make_blank_json(path):
    path.write_text('{"text": ""}\n{"text": null}\n')


def make_short_text(path):
    path.write_text("short")


def make_broken_json(path):
    path.write_text('{"text": "good"}\n{"text": \n')


def make_json_list(path):
    path.write_text("[1]\n")


def make_other_column(path):
    path.write_text('{"body": "x", "title": "y"}\n')


def make_numbers(path):
    path.write_text('{"text": 5}\n')


def make_other_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), path)


def make_broken_parquet(path):
    path.write_bytes(b"PAR1 no parquet")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing", None, "no file or folder"),
        ("data", make_empty_folder, "holds no .txt"),
        ("data", make_folder_of_images, r"1 × \.png"),
        ("data.txt", make_empty_file, "is empty"),
        ("data.jsonl", make_blank_json, "no text in"),
        ("data.txt", make_short_text, "6 tokens: too few"),
        ("data.jsonl", make_broken_json, "line 2, is not JSON"),
        ("data.jsonl", make_json_list, "no JSON object"),
        ("data.jsonl", make_other_column, "'text'. Columns: body, title"),
        ("data.jsonl", make_numbers, "holds int"),
        ("data.parquet", make_other_parquet, "'text'. Columns: body, id"),
        ("data.parquet", make_broken_parquet, "no readable parquet"),
    ],
)
def test_bad_data_is_refused_naming_the_path(tmp_path, name, make, message):
    path = tmp_path / name
    if make is not None:
        make(path)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare_dataset(training(dataset_path=path), tmp_path / "cache", 0)
    assert str(path) in str(caught.value)
    assert caught.value.fix
    assert not list((tmp_path / "cache").glob("*"))


def test_a_pattern_without_files_and_a_url_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="matches") as caught:
        sources.open_source(training(dataset_path=tmp_path, dataset_file_pattern="*.py"))
    assert "dataset_file_pattern" in caught.value.fix
    with pytest.raises(ConfigError, match="local files and folders"):
        sources.open_source(training(dataset_path="s3://bucket/data"))


def test_a_cache_that_cannot_be_written_is_an_environment_failure(tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = training(dataset_path=write_documents(tmp_path / "data"))
    with pytest.raises(EnvironmentFailure, match="cannot be written"):
        prepare_dataset(config, tmp_path / "file" / "cache", 0)


def hub_splits(**splits):
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    )


def test_a_hub_data_set_keeps_its_own_validation_split(tmp_path, monkeypatch):
    asked = []

    def load(name, config_name, *, key):
        asked.append((name, config_name))
        return hub_splits(train=["train " * 40, ""], validation=["check " * 20], test=["test"])

    monkeypatch.setattr(sources, "load_dataset", load)
    prepared = prepare_dataset(training(dataset_name="wikitext"), tmp_path / "cache", 0)
    dataset = open_prepared(prepared.path)
    assert asked == [("wikitext", "wikitext-2-raw-v1")]
    assert "wikitext-2-raw-v1" in prepared.notes[0]
    assert prepared.validation_from == "split"
    assert all("check" in text and "train" not in text for text in text_of(dataset.validation))
    assert all("check" not in text for text in text_of(dataset.train))


@pytest.mark.parametrize(
    ("splits", "message"), [({"test": ["x"]}, "only test"), ({"train": ["x"]}, "Columns: text")]
)
def test_a_hub_data_set_without_train_or_column_is_refused(monkeypatch, splits, message):
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: hub_splits(**splits))
    with pytest.raises(ConfigError, match=message):
        sources.open_source(training(dataset_name="owner/data", text_column="body"))


def test_without_network_the_hub_is_given_up_at_once(no_hub):
    config = TrainingConfig(dataset_name="wikitext", model_name_or_path="EleutherAI/pythia-410m")
    begin = time.perf_counter()
    for load, name in ((sources.open_source, "wikitext"), (load_tokenizer, "EleutherAI/pythia-410m")):
        with pytest.raises(EnvironmentFailure, match="cannot be reached") as caught:
            load(config)
        assert name in caught.value.what
        assert "local folder" in caught.value.fix
    assert time.perf_counter() - begin < 10
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("RepositoryNotFoundError", ConfigError, "no data set"),
        ("GatedRepoError", EnvironmentFailure, "refuses access"),
        ("LocalEntryNotFoundError", EnvironmentFailure, "cannot be reached"),
        ("ValueError", ConfigError, "Config name is missing"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(monkeypatch, error, kind, message):
    def fail(*_):
        try:
            raise type(error, (Exception,), {})("inner")
        except Exception as cause:
            raise OSError("Config name is missing") from cause

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind, match=message) as caught:
        hub.load_dataset("owner/data", None, key="training.dataset_name")
    assert caught.value.fix


def test_names_without_owner_are_completed(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: asked.append(arguments))
    hub.load_dataset("wikitext", "wikitext-2-raw-v1", key="training.dataset_name")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]


def test_the_byte_tokenizer_and_its_saved_form_agree(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = ByteTokenizer()
    texts = ["def f():\n\treturn 'ü'\r\n", " 日本 \x00\x7f", "", "  two  spaces "]
    tokenizer.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text, token_ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert saved(text)["input_ids"] == token_ids.tolist() == list(text.encode())
        assert tokenizer.decode([*token_ids, EOS]) == text
        assert saved.decode(token_ids, clean_up_tokenization_spaces=False) == text
    assert (saved.eos_token_id, saved.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.vocab_size % 8 == 0
    assert tokenizer.vocab_size >= len(saved)
    assert isinstance(
        load_tokenizer(training(dataset_path="x", tokenizer_name_or_path=str(tmp_path))), ByteTokenizer
    )


def test_a_hugging_face_tokenizer_from_a_folder(tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "eadt_byte_tokenizer.json").unlink()
    tokenizer = load_tokenizer(training(dataset_path="x", tokenizer_name_or_path=str(tmp_path / "tokenizer")))
    assert isinstance(tokenizer, HfTokenizer)
    assert tokenizer.vocab_size == 258
    assert tokenizer.encode_batch(["ab", ""])[0].tolist() == [97, 98]
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(training(dataset_path="x", tokenizer_name_or_path=str(tmp_path / "copy")))
    assert copy.fingerprint() == tokenizer.fingerprint() != ByteTokenizer().fingerprint()
    config = training(
        dataset_path=write_documents(tmp_path / "d"), tokenizer_name_or_path=str(tmp_path / "copy")
    )
    by_bytes = prepare_dataset(training(dataset_path=tmp_path / "d"), tmp_path / "cache", 0)
    assert prepare_dataset(config, tmp_path / "cache", 0).content_fingerprint == by_bytes.content_fingerprint


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer") as caught:
        load_tokenizer(training(dataset_path="x", tokenizer_name_or_path=str(tmp_path)))
    assert "tokenizer_name_or_path" in caught.value.fix
