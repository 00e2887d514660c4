// CNNRNN_TABLE(conv_pool) is conv_pool_avx2 where CNNRNN_ISA is avx2: the name of a family's kernel table.
#pragma once

#define CNNRNN_CONCAT_(a, b) a##_##b
#define CNNRNN_CONCAT(a, b) CNNRNN_CONCAT_(a, b)
#define CNNRNN_TABLE(family) CNNRNN_CONCAT(family, CNNRNN_ISA)
