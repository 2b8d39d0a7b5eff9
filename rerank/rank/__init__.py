"""Re-rank new rows with a trained model: `rerank rank MODEL_DIR --rows FILE --out FILE`.

Rows come as Parquet, JSONL or CSV with `history` (oldest first) and `candidates` (first-stage order, of any length),
both of original item ids: lists, or in CSV ids parted by spaces. Where the model's prompts show them, rows have
further columns: those of the user and the request by their names, `time` and `history_times` (seconds),
`history_events`, `scores` of the first stage, and numbers of the candidates by their names, one for each. Every column
is kept; `ranking` (best first), `failure` and `trace` are added. Answers are constrained to be rankings.
"""

from pathlib import Path

from rerank.models.ranker import RankingModel, generate_answers
from rerank.rank.files import FORMATS, add_answer, check_format, read_records, write_records
from rerank.rank.rows import check_limit, encode_rows

__all__ = ["FORMATS", "add_answer", "check_limit", "encode_rows", "rank_rows", "read_records", "write_records"]


def rank_rows(model_dir: str | Path, rows_path: str | Path, out_path: str | Path) -> None:
    """Rank the rows of a file into another one."""
    model, out_path = RankingModel.load(model_dir), Path(out_path)
    check_format(out_path)
    if not out_path.parent.is_dir():
        raise FileNotFoundError(f"{out_path.parent} is not a folder; make it, or choose another --out.")
    records = read_records(rows_path)
    rows = encode_rows(records, model, str(rows_path))
    check_limit(rows, model, str(rows_path))
    answers, _ = generate_answers(model, rows, constrained=True)
    write_records([add_answer(record, answer) for record, answer in zip(records, answers, strict=True)], out_path)
