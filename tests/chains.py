"""A verifier written from the docstring of dpguard.log.chain alone, shared by the log's tests."""

import hashlib
import hmac
import json
import re
from pathlib import Path


class Tampered(Exception):
    """The chain does not hold."""


def segments(folder: Path, stem: str) -> list[Path]:
    """The files of one chain, in order."""
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(re.escape(stem) + r"(?:\.(\d+))?\.jsonl", path.name)
        if match:
            found[int(match[1] or 0)] = path
    return [found[number] for number in sorted(found)]


def verify(*paths: Path, key: bytes | None = None) -> list[dict]:
    """The records of one chain; raises Tampered if it does not hold."""
    records, torn, prev = [], 0, "0" * 64
    for raw in b"".join(path.read_bytes() for path in paths).split(b"\n")[:-1]:
        try:
            record = json.loads(raw)
        except ValueError:
            torn += 1
            continue
        if record["dpguard.seq"] != len(records) or record["dpguard.prev"] != prev:
            raise Tampered(f"record {len(records)}")
        if record.get("dpguard.torn", 0) != torn:
            raise Tampered(f"{torn} torn lines before record {len(records)}")
        if key is not None:
            digest = hmac.new(key, raw[:-83] + b"}", hashlib.sha256).hexdigest()
            if record.get("dpguard.hmac") != digest:
                raise Tampered(f"HMAC of record {len(records)}")
        records.append(record)
        torn, prev = 0, hashlib.sha256(raw).hexdigest()
    if torn:
        raise Tampered("torn lines at the end")
    return records
