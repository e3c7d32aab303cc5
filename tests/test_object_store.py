"""Run folders on a server that speaks the protocol of S3, where the packages for one are installed."""

import json
from pathlib import Path

import pytest

from synapse.elsewhere import copied, here, publish
from synapse.errors import RunFolderError
from synapse.integrity import SEAL, flaws, seal
from synapse.store import check_free, new_run

s3fs = pytest.importorskip("s3fs", reason="object stores are tested with s3fs and moto[server]")
moto = pytest.importorskip("moto.server", reason="object stores are tested with s3fs and moto[server]")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The file system of a server on this machine that holds an empty bucket, which `s3://bucket` finds."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    given = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": address}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**given, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        yield system
    server.stop()


def filled(draft: Path, n_chunks: int) -> Path:
    for name in ("manifest.json", "scorecard.json", *(f"logits.zarr/cells/c/{i}/0" for i in range(n_chunks))):
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_text(json.dumps({"name": name}))
    (draft / "report.html").write_text("<html>")
    return draft


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_in_a_bucket_is_read_as_it_was_written_and_replaced_when_asked(bucket):
    check_free("s3://bucket/runs/mine", overwrite=False)
    for n_chunks in (40, 3):
        with new_run("s3://bucket/runs/mine", overwrite=True) as draft:
            written = contents(filled(draft, n_chunks))
        names = {name.removeprefix("bucket/runs/mine/") for name in bucket.find("bucket/runs/mine")}
        assert names == {*written, SEAL}
        del written["report.html"]
        read = contents(here("s3://bucket/runs/mine"))
        assert {name: read[name] for name in written} == written
        assert set(read) - set(written) == {SEAL}
    with pytest.raises(RunFolderError, match="already holds a run"):
        check_free("s3://bucket/runs/mine", overwrite=False)


def test_what_is_damaged_in_a_bucket_is_named(bucket, tmp_path):
    seal(filled(tmp_path, 3), without=["report.html"])
    publish(tmp_path, "s3://bucket/damaged")
    bucket.rm_file("bucket/damaged/logits.zarr/cells/c/1/0")
    bucket.pipe_file("bucket/damaged/scorecard.json", b"{}")
    assert flaws(copied("s3://bucket/damaged")) == [
        "logits.zarr/cells/c/1/0 is missing",
        f"scorecard.json has 2 bytes, and {(tmp_path / 'scorecard.json').stat().st_size} were written",
    ]


def test_an_empty_folder_as_browsers_of_buckets_make_them_is_free(bucket):
    bucket.call_s3("put_object", Bucket="bucket", Key="empty/", Body=b"")
    bucket.pipe_file("bucket/thesis.tex", b"years of work")
    check_free("s3://bucket/empty", overwrite=False)
    with pytest.raises(RunFolderError, match="exists and is no run folder"):
        check_free("s3://bucket/thesis.tex", overwrite=True)


def test_a_bucket_that_is_not_there_is_told_before_anything_is_computed(bucket):
    with pytest.raises(RunFolderError, match="s3://none/run could not be written to: .*bucket does not exist"):
        check_free("s3://none/run", overwrite=False)
    with pytest.raises(RunFolderError, match="There is no finished run at s3://none/run"):
        here("s3://none/run")
