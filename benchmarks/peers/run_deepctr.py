"""Trains one model with deepctr-torch's own loop; prints the seconds at which its optimizer's steps ended, as JSON.

    python run_deepctr.py DATA MODEL BATCH_SIZE cpu|cuda

DATA holds `train/*.parquet` and `schema.json`. Everything is the library's default but the widths: Adam over all
rows, L2 of 1e-5 on the tables (1e-6 in DIN), fp32.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DCN, DIN, PNN, WDL, DeepFM
from step_ends import step_ends

HIDDEN, DIM = (400, 400, 400), 16


def main() -> None:
    """One epoch of `fit`."""
    data, model_name, batch_size, device = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(2)
    schema = json.loads((data / "schema.json").read_text())
    table = pq.read_table(data / "train")
    rows = {table["name"]: table["rows"] for table in schema["tables"]}
    columns, values = [], {}
    for feature in schema["features"]:
        name, own = feature["name"], rows[feature["table"]]
        sparse = SparseFeat(name, own, embedding_dim=DIM, embedding_name=feature["table"])
        if feature["type"] == "sequence":
            columns.append(VarLenSparseFeat(sparse, feature["slots"], length_name=f"{name}_length"))
            lists = table[name].combine_chunks()
            lengths = np.diff(lists.offsets.to_numpy())
            values[name] = np.zeros((len(lengths), feature["slots"]), np.int64)
            values[name][np.arange(feature["slots"]) < lengths[:, None]] = lists.flatten().to_numpy()
            values[f"{name}_length"] = lengths.astype(np.int64)
            continue
        columns.append(sparse)
        values[name] = table[name].to_numpy()
    for feature in schema["dense"]:
        columns.append(DenseFeat(feature["name"], 1))
        values[feature["name"]] = table[feature["name"]].to_numpy()
    model = built(model_name, columns, device=device)
    model.compile("adam", "binary_crossentropy")
    ends = step_ends(model.optim, device=device)
    model.fit(values, table["label"].to_numpy(), batch_size=batch_size, epochs=1, verbose=0)
    print(json.dumps(ends))


def built(name: str, columns: list, *, device: str) -> torch.nn.Module:
    """The library's model of that name."""
    if name == "din":  # it finds the history of a candidate by the prefix
        names = [column.name.removeprefix("hist_") for column in columns if isinstance(column, VarLenSparseFeat)]
        return DIN(columns, names, dnn_hidden_units=HIDDEN, att_hidden_size=(36,), att_activation="relu", device=device)
    if name == "pnn1":
        return PNN(columns, dnn_hidden_units=HIDDEN, device=device)
    if name == "dcn":
        return DCN(columns, columns, cross_num=3, dnn_hidden_units=HIDDEN, device=device)
    return {"deepfm": DeepFM, "wide_deep": WDL}[name](columns, columns, dnn_hidden_units=HIDDEN, device=device)


if __name__ == "__main__":
    main()
