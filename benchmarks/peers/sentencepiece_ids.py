"""Ids of texts by the sentencepiece library, from the pieces and scores of a GGUF tokenizer.

python sentencepiece_ids.py --pieces pieces.json --texts texts.json --out ids.json     # needs sentencepiece, protobuf
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--pieces", "--texts", "--out"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    data = json.loads(args.pieces.read_text())
    model = proto.ModelProto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = proto.TrainerSpec.BPE, True
    trainer.vocab_size = len(data["tokens"])
    for name in ("pad", "eos", "bos", "unk"):
        setattr(trainer, f"{name}_id", data["tokens"].index(f"<{name}>"))
        setattr(trainer, f"{name}_piece", f"<{name}>")
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    for token, score, kind in zip(data["tokens"], data["scores"], data["kinds"], strict=True):
        piece = model.pieces.add()
        piece.piece = token.replace(" ", "\u2581") if kind == 4 else token  # llama.cpp writes these with spaces
        piece.score, piece.type = score, 2 if token == "<unk>" else kind
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.SerializeToString())
    args.out.write_text(json.dumps([processor.EncodeAsIds(text) for text in json.loads(args.texts.read_text())]))


if __name__ == "__main__":
    main()
