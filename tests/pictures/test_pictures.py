"""Where pictures come from, how they are read, and how an interrupted reading goes on."""

from __future__ import annotations

import gc
import gzip
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import models, transforms
from torchvision.transforms import v2

from retrofit import RetrofitError
from retrofit.pictures.batches import PictureBatches, shuffled
from retrofit.pictures.eight_bits import eight_bits
from retrofit.pictures.preprocessing import preprocessing
from retrofit.pictures.sources import open_pictures

OPEN_FILES = Path("/proc/self/fd")  # on Linux
Resize, CenterCrop, ToTensor = transforms.Resize, transforms.CenterCrop, transforms.ToTensor


def picture(width, height, *, seed=0):
    """Soft blobs, as in a photograph: JPEG keeps them well."""
    blobs = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(width=20, height=16, *, seed=0):
    file = io.BytesIO()
    picture(width, height, seed=seed).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, *, shards=3, each=4):
    """train-000.tar ...; every picture is another, with a label before and a caption after it."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        files = {}
        for key in range(shard * each, (shard + 1) * each):
            label = {f"{key:05}.cls": b"7", f"{key:05}.jpg": jpeg(seed=key)}
            files |= label | {f"{key:05}.txt": b"a picture" * key}
        write_tar(folder / f"train-{shard:03}.tar", files)
    return folder


def pixels(pictures, index):
    return np.array(eight_bits(pictures.read(index)))


# --- tar shards --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "shards"),
    [("", range(3)), ("train-001.tar", [1]), ("train-{001..002}.tar", [1, 2])],
    ids=["folder", "file", "pattern"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_give_by_index_what_webdataset_reads_in_a_row(tmp_path, source, shards):
    folder = write_shards(tmp_path / "data")
    pictures = open_pictures(folder / source)
    urls = [str(folder / f"train-{shard:03}.tar") for shard in shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(pictures) == len(samples) == 4 * len(shards)
    for index in shuffled(len(pictures), seed=1):
        assert np.array_equal(pixels(pictures, index), samples[index]["jpg"])
        assert pictures.name(index) == f"{samples[index]['__url__']}/{4 * shards[0] + index:05}.jpg"
    assert not pictures.bad


def test_a_sample_is_one_picture_unless_all_have_longer_extensions(tmp_path):
    files = ["a.jpg", "a.seg.png", "b.left.jpg", "b.right.JPG", "c.json", "._d.jpg", "e/f.1/g.png"]
    shard = write_tar(tmp_path / "a.tar", dict.fromkeys(files, jpeg()))
    pictures = open_pictures(shard)
    used = ["a.jpg", "b.left.jpg", "b.right.JPG", "e/f.1/g.png"]
    assert [pictures.name(i) for i in range(len(pictures))] == [f"{shard}/{name}" for name in used]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_shard_cut_short_is_named_or_its_complete_pictures_are_used(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    contents = [jpeg(seed=i) for i in range(4)]
    whole = write_tar(folder / "a.tar", {f"{i}.jpg": c for i, c in enumerate(contents)})
    written = whole.read_bytes()
    ends = [written.index(content) + len(content) for content in contents]
    last = -(-ends[-1] // 512) * 512 + 512  # with one block of the end mark
    cut = data.draw(st.integers(1, last - 1))
    whole.write_bytes(written[:cut])
    with pytest.raises(RetrofitError, match=r"a\.tar is (cut short|not an uncompressed tar)"):
        open_pictures(whole)

    write_tar(folder / "b.tar", {"b.jpg": jpeg()})
    pictures = open_pictures(folder, skip_bad=True)
    assert len(pictures) == sum(end <= cut for end in ends) + 1
    for index, content in enumerate(contents[: len(pictures) - 1]):
        assert np.array_equal(pixels(pictures, index), np.asarray(Image.open(io.BytesIO(content))))
    (bad,) = pictures.bad
    assert bad.startswith(f"{whole} is")


def failing(_picture):
    raise RuntimeError("boom")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_transform_of_ones_own_is_passed_on(workers):
    batches = PictureBatches(Counted(4), range(4), failing, batch_size=2, workers=workers)
    with pytest.raises(RuntimeError, match="boom") as caught:
        list(batches)
    assert caught.tb is not None  # the error is held, as a notebook does
    assert multiprocessing.active_children() == []


FORKED = []  # what to do once, after a process has forked
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=lambda: FORKED and FORKED.pop()())


@pytest.mark.skipif(sys.platform == "win32", reason="processes do not fork")
def test_an_interrupt_while_processes_start_is_not_lost():
    batches = PictureBatches(Counted(4), range(4), np.array, batch_size=2, workers=2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some runner may ignore it
    try:
        FORKED.append(lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            list(batches)
        assert FORKED == []
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.skipif(not OPEN_FILES.exists(), reason="needs /proc")
def test_a_shard_that_the_system_cannot_read_is_named(tmp_path):
    (tmp_path / "a.tar").symlink_to("/proc/self/mem")
    with pytest.raises(RetrofitError, match=r"a\.tar cannot be read \(Input/output error\)"):
        open_pictures(tmp_path)


def test_a_damaged_header_does_not_pass_for_the_end_of_a_shard(tmp_path):
    shard = write_shards(tmp_path, shards=1) / "train-000.tar"
    written = shard.read_bytes()
    header = written.index(b"00002.cls")
    shard.write_bytes(written[:header] + b"\xff" * 100 + written[header + 100 :])
    with pytest.raises(RetrofitError, match=r"train-000\.tar is cut short or damaged.*--skip-bad"):
        open_pictures(shard)
    assert len(open_pictures(shard, skip_bad=True)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an uncompressed tar file"),
        (b"no tar" * 200, "is not an uncompressed tar file"),
        (gzip.compress(b"tar" * 999), "is not an uncompressed tar file"),
        ({}, "has no pictures in it"),
        ({"a.cls": b"1", "a.txt": b"no picture"}, "has no pictures in it .*leave it out"),
        ({"a.jpg": jpeg(), "a.JPG": jpeg()}, r"is refused by webdataset \(a.JPG: duplicate"),
    ],
    ids=["empty", "text", "compressed", "no files", "no pictures", "one name twice"],
)
def test_what_is_no_shard_of_pictures_is_named(tmp_path, content, message):
    shard = tmp_path / "a.tar"
    if isinstance(content, dict):
        write_tar(shard, content)
    else:
        shard.write_bytes(content)
    with pytest.raises(RetrofitError, match=rf"a\.tar {message}"):
        open_pictures(shard)
    with pytest.raises(
        RetrofitError, match=rf"no pictures to use: .*a\.tar {message.split('.*')[0]}"
    ):
        open_pictures(shard, skip_bad=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mixed", r"both pictures \(.*c\.jpg, ...\) and tar shards \(.*b\.tar, ...\)"),
        ("mixed/{a,b}.tar", r"stands for 2 shards, and 1 of them do not exist: .*a\.tar"),
        ("mixed/{b.tar", "is no pattern of shards"),
        ("mixed/a.tar", "there is no folder or file"),
        ("b.tar.gz", r"neither a folder of pictures nor a .npy, .npz or \(uncompressed\) .tar"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, source, message):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "c.jpg").write_bytes(jpeg())
    write_tar(tmp_path / "mixed" / "b.tar", {"b.jpg": jpeg()})
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.raises(RetrofitError, match=message):
        open_pictures(tmp_path / source)


def test_without_webdataset_the_message_says_what_to_install(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "data", shards=1)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    needed = r"^webdataset is needed for tar .*: pip install 'batchnorm-retrofit\[webdataset\]'$"
    for source in (folder, folder / "train-{000..000}.tar"):
        with pytest.raises(RetrofitError, match=needed):
            open_pictures(source)


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="counts open files as Linux does")
def test_a_process_opens_each_shard_once_and_not_all_of_them_at_a_time(tmp_path):
    def opened():
        return sum(os.path.realpath(fd).startswith(str(tmp_path)) for fd in OPEN_FILES.iterdir())

    few = open_pictures(write_shards(tmp_path / "few"))
    assert opened() == 0
    for index in range(len(few)):
        few.read(index)
    assert opened() == 3
    for shard in (tmp_path / "few").iterdir():
        shard.unlink()
    assert np.array_equal(pixels(few, 5), Image.open(io.BytesIO(jpeg(seed=5))))

    many = open_pictures(write_shards(tmp_path / "many", shards=200, each=1))
    for index in range(200):
        assert np.array_equal(pixels(many, index), Image.open(io.BytesIO(jpeg(seed=index))))
    assert opened() < 150


def test_workers_read_shards_that_are_open_already(tmp_path):
    pictures = open_pictures(write_shards(tmp_path / "data", each=20))
    order = shuffled(len(pictures), seed=0)
    there = [ToTensor()(pixels(pictures, index)) for index in order]
    batches = PictureBatches(pictures, order, ToTensor(), batch_size=4, workers=2)
    assert torch.equal(torch.cat(list(batches)), torch.stack(there))


# --- pickling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["a.npy", "a.npz", "a.tar"])
def test_a_worker_gets_no_pixels_with_its_orders(tmp_path, file):
    images = np.stack([np.asarray(picture(200, 150, seed=seed)) for seed in range(20)])
    if file == "a.npy":
        np.save(tmp_path / file, images)
    elif file == "a.npz":
        np.savez(tmp_path / file, images=images, labels=np.arange(20))
    else:
        write_tar(tmp_path / file, {f"{i}.jpg": jpeg(200, 150, seed=i) for i in range(20)})
    pictures = open_pictures(tmp_path / file)
    before = pixels(pictures, 7)
    pickled = pickle.dumps(pictures)
    assert len(pickled) < 3000
    there = pickle.loads(pickled)  # noqa: S301 - just pickled
    assert np.array_equal(pixels(there, 7), before)
    assert (there.name(7), len(there)) == (pictures.name(7), len(pictures))
    if file == "a.npy":
        assert isinstance(there.array, np.memmap)


def test_a_damaged_archive_of_arrays_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    written = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(written[: len(written) // 2])
    with pytest.raises(RetrofitError, match=r"a\.npz cannot be read"):
        open_pictures(tmp_path / "a.npz")


# --- JPEGs at a reduced size -------------------------------------------------------------------


def through(folder, transform, size, kind="JPEG"):
    """What comes of one picture of that size, the same from a full decode, and what was decoded."""
    picture(*size).save(folder / f"a.{kind.lower()}", kind)
    seen = []

    class Seeing(transforms.Compose):
        def __call__(self, image):
            seen.append(image.size)
            return super().__call__(image)

    pictures = open_pictures(folder)
    (batch,) = PictureBatches(pictures, [0], Seeing([transform]), batch_size=1, workers=0)
    with Image.open(folder / f"a.{kind.lower()}") as full:
        return batch[0], transform(full.convert("RGB")), seen[0]


def timms(**changes):
    data = pytest.importorskip("timm.data")
    return data.create_transform((3, 64, 64), is_training=False, **changes)


BY_A_RESIZE = {
    "VGG16": (models.VGG16_Weights.DEFAULT.transforms(resize_size=64, crop_size=56), 4),
    "FCN": (models.segmentation.FCN_ResNet50_Weights.DEFAULT.transforms(resize_size=64), 4),
    "SSD": (
        preprocessing(models.detection.SSD300_VGG16_Weights.DEFAULT.transforms, resize=64),
        4,
    ),
    "v1": (transforms.Compose([Resize(33), CenterCrop(32), ToTensor()]), 8),
    "v1 longer side": (transforms.Compose([Resize(90, max_size=99), ToTensor()]), 4),
    "v1 both sides": (transforms.Compose([Resize((100, 30)), ToTensor()]), 2),
    "v2": (v2.Compose([v2.Resize(120), v2.ToImage(), v2.ToDtype(torch.float, scale=True)]), 2),
}


@pytest.mark.parametrize(("transform", "scale"), BY_A_RESIZE.values(), ids=BY_A_RESIZE)
def test_a_large_jpeg_is_decoded_at_a_reduced_size_with_nearly_the_same_result(
    tmp_path, transform, scale
):
    ours, full, decoded = through(tmp_path, transform, (800, 600))
    assert decoded == (800 // scale, 600 // scale)
    assert ours.shape == full.shape
    assert (ours - full).abs().mean() < 0.01 * full.std()


@pytest.mark.parametrize(("mode", "scale"), [("center", 4), ("squash", 4), ("border", 1)])
def test_so_it_is_for_timm_where_it_uses_a_resize_of_torchvision(tmp_path, mode, scale):
    ours, full, decoded = through(tmp_path, timms(crop_mode=mode), (800, 600))
    assert decoded == (800 // scale, 600 // scale)
    assert (ours - full).abs().mean() < 0.01 * full.std()


@pytest.mark.parametrize(
    "transform",
    [
        ToTensor(),
        transforms.Compose([CenterCrop(500), Resize(32), ToTensor()]),
        transforms.Compose([Resize(32, transforms.InterpolationMode.NEAREST), ToTensor()]),
        transforms.Compose([Resize(301), ToTensor()]),
        models.segmentation.FCN_ResNet50_Weights.DEFAULT.transforms(resize_size=None),
        lambda image: ToTensor()(image.resize((32, 32))),
    ],
    ids=["no resize", "crop first", "nearest", "too little", "none", "unknown"],
)
def test_where_a_smaller_picture_would_not_do_the_whole_one_is_decoded(tmp_path, transform):
    ours, full, decoded = through(tmp_path, transform, (800, 600))
    assert decoded == (800, 600)
    assert torch.equal(ours, full)


def test_other_formats_are_decoded_as_they_are(tmp_path):
    ours, full, decoded = through(tmp_path, BY_A_RESIZE["v1"][0], (800, 600), "PNG")
    assert decoded == (800, 600)
    assert torch.equal(ours, full)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(40, 300),
    st.integers(40, 300),
    st.integers(5, 20),
    st.one_of(st.none(), st.integers(21, 40)),
)
def test_reducing_never_changes_the_size_of_the_result(tmp_path_factory, w, h, size, most):
    transform = transforms.Compose([Resize(size, max_size=most), ToTensor()])
    ours, full, _ = through(tmp_path_factory.mktemp("sizes"), transform, (w, h))
    assert ours.shape == full.shape


# --- batches -----------------------------------------------------------------------------------


class Counted:
    """Pictures of one colour each; those in `unreadable` raise. Notes which were read."""

    bad = ()

    def __init__(self, count, unreadable=(), prefix=""):
        self.count, self.unreadable, self.prefix = count, unreadable, prefix
        self.log = []

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{self.prefix}{index}"

    def read(self, index):
        self.log.append(index)
        if index in self.unreadable:
            raise OSError("broken")
        return Image.new("RGB", (2, 2), (index, 0, 0))


def batches_of(pictures, batch_size, *, workers=0, order=None, transform=None):
    order = shuffled(len(pictures), seed=0) if order is None else order
    return PictureBatches(
        pictures,
        order,
        transform or ToTensor(),
        batch_size=batch_size,
        workers=workers,
        skip_bad=True,
    )


def shown(batches):
    """Which pictures each batch has."""
    return [(batch[:, 0, 0, 0] * 255).round().int().tolist() for batch in batches]


def test_pictures_none_of_which_can_be_read_are_refused_with_what_is_wrong():
    batches = batches_of(Counted(5, range(5)), 2)
    with pytest.raises(RetrofitError, match=r"none of 5 pictures can be read: \d: broken"):
        list(batches)
    one = batches_of(Counted(5, range(1, 5)), 2)
    assert shown(one) == [[0]]
    one.load_state_dict({**one.state_dict(), "batches": 1, "bad": []})
    assert list(one) == []  # those before could be read


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_resumed_iteration_gives_the_rest_and_reads_nothing_twice(data):
    count, batch_size = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 9))
    unreadable = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    whole = batches_of(Counted(count, unreadable), batch_size)
    everything = shown(whole)

    first = batches_of(Counted(count, unreadable), batch_size)
    iterator, stop = iter(first), data.draw(st.integers(0, len(everything)))
    given = shown(next(iterator) for _ in range(stop))
    state = json.loads(json.dumps(first.state_dict()))

    rest = batches_of(Counted(count, unreadable), batch_size)
    rest.load_state_dict(state)
    assert rest.state_dict() == state
    left = rest.left
    assert given + shown(rest) == everything
    assert len(rest.dataset.pictures.log) == left == count - len(first.dataset.pictures.log)
    assert sorted(rest.bad, key=int) == [str(i) for i in sorted(unreadable)]
    assert rest.state_dict() == whole.state_dict()


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_what_workers_have_read_ahead_is_not_taken_for_given(stop):
    whole = shown(batches_of(Counted(40, {3, 4}), 6))
    first = batches_of(Counted(40, {3, 4}), 6, workers=2)
    iterator = iter(first)
    given = shown(next(iterator) for _ in range(stop))
    rest = batches_of(Counted(40, {3, 4}), 6, workers=2)
    rest.load_state_dict(first.state_dict())
    assert given + shown(rest) == whole


def test_every_iteration_starts_at_the_beginning_unless_a_state_was_loaded():
    batches = batches_of(Counted(10, {2}), 4)
    everything = shown(batches)
    next(iter(batches))
    middle = batches.state_dict()
    assert shown(batches) == everything
    batches.load_state_dict(middle)
    assert (len(batches), batches.left, len(batches.dataset)) == (2, 6, 10)
    assert shown(batches) == everything[1:]
    assert shown(batches) == everything
    assert (len(batches), batches.left, batches.bad) == (3, 10, ["2"])
    iter(batches)
    assert batches.state_dict()["batches"] == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (batches_of(Counted(11), 4), "another data set: 10 pictures .*, not 11 pictures"),
        (batches_of(Counted(10, prefix="x"), 4), "another data set: 10 pictures"),
        (batches_of(Counted(10), 4, order=range(10)), "another data set: 10 pictures"),
        (batches_of(Counted(10), 8), "another batch size: 4, not 8"),
        (
            batches_of(Counted(10), 4, transform=transforms.Compose([ToTensor()])),
            r"another transform: ToTensor\(\), not Compose\( ToTensor\(\) \)",
        ),
    ],
    ids=["count", "names", "order", "batch size", "transform"],
)
def test_a_state_of_something_else_is_refused_with_what_differs(other, message):
    batches = batches_of(Counted(10), 4)
    with pytest.raises(RetrofitError, match=f"the state is of {message}"):
        other.load_state_dict(batches.state_dict())
    assert len(shown(other)) == len(other)
    with pytest.raises(RetrofitError, match="this is no state of PictureBatches: batch_size is"):
        batches.load_state_dict({"batches": 1, "bad": [], "data_set": ""})


def test_a_transform_is_the_same_in_another_process_although_it_lies_elsewhere():
    def made():
        return batches_of(Counted(10), 4, transform=lambda image: ToTensor()(image.convert("L")))

    here, there = made(), made()
    there.load_state_dict(here.state_dict())


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="counts open files as Linux does")
def test_large_batches_do_not_use_up_the_files_that_a_process_may_open():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    batches = batches_of(Counted(200), 100, workers=2)

    def hangs(*_):  # as workers do that cannot open a file
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(OPEN_FILES.iterdir())) + 60, before[1]))
    try:
        assert sum(map(len, batches)) == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory is for a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_lie_in_pinned_memory(workers):
    options = {"batch_size": 4, "workers": workers, "pin": True}
    assert all(b.is_pinned() for b in PictureBatches(Counted(9), range(9), ToTensor(), **options))


def test_linked_folders_are_read_once_and_hidden_ones_not_at_all(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for place in (folder / "cat", folder / ".trash", elsewhere):
        place.mkdir(parents=True)
        (place / "0.jpg").write_bytes(jpeg())
    (folder / "dog").symlink_to(elsewhere)
    (folder / "cat" / "up").symlink_to(folder)
    pictures = open_pictures(folder)
    names = [pictures.name(i) for i in range(len(pictures))]
    assert names == [str(folder / "cat" / "0.jpg"), str(folder / "dog" / "0.jpg")]
