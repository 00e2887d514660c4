#include "tensor.h"
#include "cpu/conv_pool.h"
