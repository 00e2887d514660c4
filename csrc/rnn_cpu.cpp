#include "tensor.h"
#include "cpu/rnn.h"
