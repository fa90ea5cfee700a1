"""Trains one model with fuxictr's own loop; prints the seconds at which its optimizer's steps ended, as JSON.

    python run_fuxictr.py DATA MODEL BATCH_SIZE cpu|cuda

DATA holds `train/*.parquet` and `schema.json`. The wheel has the layers and the loop but no models for single rows,
so these stand here, on its public layers. Its defaults stay: Adam over all rows, the gradient norm of all parameters
clipped at 10, numbers embedded as well, no L2, fp32, rows read from npz.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import (
    CrossNet,
    DIN_Attention,
    FactorizationMachine,
    FeatureEmbedding,
    FeatureEmbeddingDict,
    InnerProductInteraction,
    LogisticRegression,
    MLP_Block,
)
from fuxictr.pytorch.models import BaseModel
from step_ends import step_ends
from torch import nn

HIDDEN, DIM = [400, 400, 400], 16
VALID_ROWS = 256


class Model(BaseModel):
    """What the five have in common: vectors of all features, and a sigmoid at the end."""

    def __init__(self, feature_map: FeatureMap, *, folder: str, device: str) -> None:
        super().__init__(
            feature_map, verbose=0, model_root=folder, metrics=["logloss"], monitor="logloss", monitor_mode="min",
            gpu=0 if device == "cuda" else -1,
        )  # fmt: skip
        self.width = feature_map.sum_emb_out_dim()
        self.layers(feature_map)
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()

    def layers(self, feature_map: FeatureMap) -> None:
        self.embedding_layer = FeatureEmbedding(feature_map, DIM)

    def forward(self, inputs: dict) -> dict:
        return {"y_pred": self.output_activation(self.logit(self.get_inputs(inputs)))}


class DeepFM(Model):
    def layers(self, feature_map: FeatureMap) -> None:
        super().layers(feature_map)
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(self.width, HIDDEN, output_dim=1)

    def logit(self, x: dict) -> torch.Tensor:
        emb_BFK = self.embedding_layer(x)
        return self.fm(x, emb_BFK) + self.mlp(emb_BFK.flatten(1))


class WideDeep(Model):
    def layers(self, feature_map: FeatureMap) -> None:
        super().layers(feature_map)
        self.wide = LogisticRegression(feature_map)
        self.mlp = MLP_Block(self.width, HIDDEN, output_dim=1)

    def logit(self, x: dict) -> torch.Tensor:
        return self.wide(x) + self.mlp(self.embedding_layer(x, flatten_emb=True))


class DCN(Model):
    def layers(self, feature_map: FeatureMap) -> None:
        super().layers(feature_map)
        self.cross = CrossNet(self.width, 3)
        self.mlp = MLP_Block(self.width, HIDDEN)
        self.out = nn.Linear(self.width + HIDDEN[-1], 1)

    def logit(self, x: dict) -> torch.Tensor:
        x_BD = self.embedding_layer(x, flatten_emb=True)
        return self.out(torch.cat([self.cross(x_BD), self.mlp(x_BD)], dim=1))


class PNN1(Model):
    def layers(self, feature_map: FeatureMap) -> None:
        super().layers(feature_map)
        self.products = InnerProductInteraction(feature_map.num_fields, output="inner_product")
        pairs = feature_map.num_fields * (feature_map.num_fields - 1) // 2
        self.mlp = MLP_Block(self.width + pairs, HIDDEN, output_dim=1)

    def logit(self, x: dict) -> torch.Tensor:
        emb_BFK = self.embedding_layer(x)
        return self.mlp(torch.cat([emb_BFK.flatten(1), self.products(emb_BFK)], dim=1))


class DIN(Model):
    def layers(self, feature_map: FeatureMap) -> None:
        self.embedding_layer = FeatureEmbeddingDict(feature_map, DIM)
        self.history = next(name for name in feature_map.features if name.startswith("hist_"))
        self.attention = DIN_Attention(DIM, attention_units=[36])
        self.mlp = MLP_Block(self.width, HIDDEN, output_dim=1)

    def logit(self, x: dict) -> torch.Tensor:
        vectors = self.embedding_layer(x)
        keys_BLK = vectors.pop(self.history)
        mask_BL = x[self.history].long() > 0
        attended_BK = self.attention(vectors[self.history.removeprefix("hist_")], keys_BLK, mask_BL)
        return self.mlp(torch.cat([*vectors.values(), attended_BK], dim=1))


MODELS = {"deepfm": DeepFM, "wide_deep": WideDeep, "dcn": DCN, "pnn1": PNN1, "din": DIN}


def main() -> None:
    """One epoch of `fit`."""
    data, model_name, batch_size, device = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(2)
    schema = json.loads((data / "schema.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "clicks").mkdir()
        write_rows(data, schema, folder=folder)
        feature_map = FeatureMap("clicks", folder)
        feature_map.load(f"{folder}/feature_map.json", {"embedding_dim": DIM})
        model = MODELS[model_name](feature_map, folder=folder, device=device)
        train, valid = RankDataLoader(
            feature_map, stage="train", train_data=f"{folder}/train", valid_data=f"{folder}/valid",
            batch_size=batch_size, data_format="npz",
        )  # fmt: skip
        ends = step_ends(model.optimizer, device=device)
        model.fit(train, validation_data=valid, epochs=1)
    print(json.dumps(ends))


def write_rows(data: Path, schema: dict, *, folder: str) -> None:
    """The library's own files: its feature map, and rows as npz."""
    table = pq.read_table(data / "train")
    rows = {table["name"]: table["rows"] for table in schema["tables"]}
    specs, columns = [], {"label": table["label"].to_numpy()}
    for feature in schema["features"]:
        name, spec = feature["name"], {"type": "categorical", "source": "", "vocab_size": rows[feature["table"]]}
        if feature["type"] == "sequence":
            spec |= {"type": "sequence", "max_len": feature["slots"], "share_embedding": feature["table"]}
            lists = table[name].combine_chunks()
            lengths = np.diff(lists.offsets.to_numpy())
            columns[name] = np.zeros((len(lengths), feature["slots"]), np.int64)
            columns[name][np.arange(feature["slots"]) < lengths[:, None]] = lists.flatten().to_numpy()
        else:
            columns[name] = table[name].to_numpy()
        specs.append({name: spec})
    for feature in schema["dense"]:
        specs.append({feature["name"]: {"type": "numeric", "source": ""}})
        columns[feature["name"]] = table[feature["name"]].to_numpy()
    found = {"dataset_id": "clicks", "features": specs, "labels": ["label"]}
    Path(folder, "feature_map.json").write_text(json.dumps(found))
    np.savez(Path(folder, "train.npz"), **columns)
    np.savez(Path(folder, "valid.npz"), **{name: values[:VALID_ROWS] for name, values in columns.items()})


if __name__ == "__main__":
    main()
