"""Networks that join a CNN with an RNN, in each of the three ways, and what is built of them."""

from cnnrnn_ext.models.cnnrnn import CNNRNN
from cnnrnn_ext.models.multimodal import MultiModal
from cnnrnn_ext.models.parallel import ParallelCNNRNN
from cnnrnn_ext.models.rnncnn import RNNCNN
from cnnrnn_ext.models.seq2seq import Seq2Seq

__all__ = ["CNNRNN", "RNNCNN", "MultiModal", "ParallelCNNRNN", "Seq2Seq"]
