// The kernels on tile registers, beside those for avx512; see isa_avx512.cpp for what may stand here.

#include "conv_pool_columns.h"
#include "conv_pool_tiles.h"
#include "conv_pool_tiles_grad_input.h"
#include "conv_pool_tiles_grad_weight.h"
#include "conv_pool_winograd_tiles.h"
#include "rnn_turned.h"

namespace cnnrnn {
extern const RnnKernels<float> rnn_amx_float32, rnn_amx_bfloat16;
const RnnKernels<float> rnn_amx_float32 = parted_kernels<3>();
const RnnKernels<float> rnn_amx_bfloat16 = parted_kernels<1>();

extern const CellKernels<float> rnn_amx_turned[kCells];
const CellKernels<float> rnn_amx_turned[kCells] = {turned_cell<3, LstmUnits>(), turned_cell<3, GruUnits>(),
                                                   turned_cell<3, ElmanUnits<ElmanTanh>>(),
                                                   turned_cell<3, ElmanUnits<ElmanRelu>>()};

extern const ConvPoolTiles conv_pool_amx;
const ConvPoolTiles conv_pool_amx = {
    tiles_forward<3, float>(),
    columns_forward<3, float>(),
    winograd_tiles_of<2>(),
    winograd_tiles_of<4>(),
    tiles_forward<1, Half>(),
    columns_forward<1, Half>(),
    {tiles_weight_panels, tiles_weight_sums, tiles_weight_input_bytes, tiles_weight_map_bytes,
     tiles_weight_scratch_bytes, tiles_weight_part_input, tiles_weight_part_map, tiles_weight,
     tiles_input_units, tiles_input_groups, tiles_input_map_tiles, tiles_input_map_bytes,
     tiles_input_scratch_bytes, tiles_input_part_map, tiles_input}};
}  // namespace cnnrnn
