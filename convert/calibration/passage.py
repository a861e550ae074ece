"""A passage of plain English, on which the source and the result of a conversion are compared."""

from internvl3_mlx.checkpoints.build_model import LoadedModel
from internvl3_mlx.convert.calibration.data import CalibrationSample

PASSAGE_TOKENS = 128
PASSAGE = """\
The bus was late again, so Maria walked along the river to the library. She liked the old building \
with its tall windows and its quiet reading room. At the front desk a man was asking whether he \
could borrow three books at once. "Of course," said the librarian, "but please bring them back \
before the end of the month." Maria found a seat by the window and opened her notebook. She had to \
write two pages about how rain forms. Warm air rises and carries water with it; higher up the air \
cools, and the water turns into small drops that gather in clouds. When the drops grow heavy \
enough, they fall."""


def passage_sample(loaded: LoadedModel) -> CalibrationSample:
    """Return the beginning of the passage as a sample of which every token is scored."""
    token_ids = list(loaded.tokenizer.encode_text(PASSAGE))[:PASSAGE_TOKENS]
    return CalibrationSample(token_ids, None, 0)
