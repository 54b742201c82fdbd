"""Streams whose files are damaged or change between two starts of a run."""

import json
from itertools import islice

import pytest
from data_sources import BYTE, EOS, rows_of

from flame.config.sections import JobConfig, Training, Validation
from flame.data import token_stream
from flame.data.run_data import open_data


class TestChangedStream:
    """Files that are damaged, and files that change, between two starts of a run."""

    LENGTH = 8

    @pytest.fixture
    def folder(self, tmp_path):
        for part in range(3):
            lines = [json.dumps({"text": f"part {part} line {i}"}) + "\n" for i in range(40)]
            (tmp_path / f"part-{part}.jsonl").write_text("".join(lines))
        return tmp_path

    def loader(self, folder, sequences=0, **options):
        shape = {"seq_len": self.LENGTH, "batch_size": 2, "streaming": True, "bos": "none"}
        config = JobConfig(
            training=Training(dataset=str(folder), **shape, **options),
            validation=Validation(share=0, sequences=sequences),
        )
        return open_data(config, BYTE).loader(dp_rank=0, dp_world_size=1)

    @staticmethod
    def edit(folder, part, edit):
        file = folder / f"part-{part}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        edit(lines)
        file.write_text("".join(lines))

    def tokens(self, folder):
        files = sorted(folder.glob("*.jsonl"))
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [i for line in lines for i in (*json.loads(line)["text"].encode(), EOS)]

    def in_part_1(self, folder):
        """A state about ten documents into part 1, and the tokens before it."""
        loader = self.loader(folder)
        rows_of([loader], 47)
        assert json.loads(loader.state_dict()["places"])["places"][0][:2] == [0, 1]
        return loader.state_dict(), 47 * 2 * self.LENGTH

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: TestChangedStream.edit(folder, 1, lambda lines: lines.pop(30)),
            lambda folder: TestChangedStream.edit(folder, 1, lambda lines: lines.append(lines[0])),
            lambda folder: TestChangedStream.edit(folder, 2, lambda lines: lines.pop(3)),
            lambda folder: (folder / "part-2.jsonl").unlink(),
            lambda folder: (folder / "part-3.jsonl").write_text('{"text": "more"}'),
        ],
        ids=["line", "longer", "file", "gone", "added"],
    )
    def test_what_is_still_to_be_read_may_change(self, folder, change):
        state, used = self.in_part_1(folder)
        change(folder)
        loader = self.loader(folder)
        loader.load_state_dict(state)
        tokens = self.tokens(folder)[used:]
        for i, row in enumerate(rows_of([loader], 20)):
            assert row == tokens[i * self.LENGTH : (i + 1) * self.LENGTH + 1]

    def test_a_file_that_lies_ahead_can_be_left_out(self, folder):
        state, _ = self.in_part_1(folder)
        expected = self.loader(folder)
        expected.load_state_dict(state)
        without = self.loader(folder, data_files="part-[01]*")
        assert rows_of([without], 20, state) == rows_of([expected], 20)
        none = self.loader(folder, data_files="part-[02]*")
        with pytest.raises(ValueError, match=r"data has part-1\.jsonl, .* this run's has part-2\."):
            none.load_state_dict(state)

    def test_what_was_read_must_stay(self, folder):
        state, _ = self.in_part_1(folder)
        self.edit(folder, 0, lambda lines: lines.pop(3))
        with pytest.raises(
            ValueError,
            match=r"^--training\.dataset: .*part-0\.jsonl, 1,\d+ bytes, as file 1, which was read;",
        ):
            self.loader(folder).load_state_dict(state)

    @pytest.mark.parametrize(
        "edit", [lambda lines: lines.pop(3), lambda lines: lines.__delitem__(slice(5, None))]
    )
    def test_what_was_read_of_a_file_must_stay(self, folder, edit):
        state, _ = self.in_part_1(folder)
        self.edit(folder, 1, edit)
        loader = self.loader(folder)
        loader.load_state_dict(state)
        with pytest.raises(
            ValueError, match=r"document 1\d of part-1\.jsonl, where the checkpoint stopped"
        ):
            rows_of([loader], 1)

    def test_held_out_documents_must_stay(self, folder):
        state = self.loader(folder, 3).state_dict()
        self.edit(folder, 0, lambda lines: lines.reverse())
        with pytest.raises(
            ValueError, match=r"^--training\.dataset: the checkpoint's data has held"
        ):
            self.loader(folder, 3).load_state_dict(state)

    def test_after_an_epoch_all_must_stay(self, folder):
        loader = self.loader(folder)
        rows_of([loader], 130)
        state = loader.state_dict()
        more = folder / "part-3.jsonl"
        more.write_text('{"text": "more"}')
        with pytest.raises(ValueError, match=r"data has 3 files, all of which were read; .*has 4"):
            self.loader(folder).load_state_dict(state)
        more.unlink()
        self.edit(folder, 2, lambda lines: lines.pop())
        with pytest.raises(ValueError, match=r"has part-2\.jsonl, .* as file 3, which was read"):
            self.loader(folder).load_state_dict(state)

    def test_states_of_earlier_versions(self, folder):
        state, _ = self.in_part_1(folder)
        # the document in which the next sequence begins, without what was read and how documents begin
        old = state | {"places": json.dumps(json.loads(state["places"])["places"])}
        old["checksum"] = self.loader(folder)._earlier_checksum
        assert rows_of([self.loader(folder)], 5, old) == rows_of([self.loader(folder)], 5, state)
        self.edit(folder, 2, lambda lines: lines.pop())
        with pytest.raises(
            ValueError, match=r"^--training\.dataset: the checkpoint's data has check"
        ):
            self.loader(folder).load_state_dict(old)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_all_before_a_bad_line_is_trained_on_and_the_rest_when_it_is_corrected(
        self, folder, monkeypatch, num_workers
    ):
        monkeypatch.setattr(token_stream, "_CHUNK", 200)
        expected = rows_of([self.loader(folder)], 60)
        good = (folder / "part-1.jsonl").read_text()
        self.edit(folder, 1, lambda lines: lines.__setitem__(20, "{cut\n"))
        loader = self.loader(folder, num_workers=num_workers)
        rows = []

        def read_on():
            for inputs, _ in loader:
                rows.extend(inputs["input"].tolist())
                yield loader.mark(), loader.state_dict()

        steps = read_on()
        # no token before the line is left that would fill a batch
        text = (folder / "part-0.jsonl").read_text() + good
        before = [json.loads(line)["text"] for line in text.splitlines()[:60]]
        num_steps = (len("".join(before)) + len(before) - 1) // (2 * self.LENGTH)
        *_, (mark, state) = islice(steps, num_steps)
        with pytest.raises(ValueError, match=r"part-1\.jsonl': line 21 is not JSON"):
            next(steps)
        assert rows == [row[:-1] for row in expected[: len(rows)]]
        loader.rewind(mark)
        assert loader.state_dict() == state
        loader.close()
        (folder / "part-1.jsonl").write_text(good)
        continued = self.loader(folder, num_workers=num_workers)
        assert rows_of([continued], 60 - num_steps, state) == expected[len(rows) :]
        continued.close()
