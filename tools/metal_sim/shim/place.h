// What the engine and a kernel's text share: where a thread stands, under the names of MSL's attributes.
#pragma once

struct gpu_place {
  unsigned dispatch_quadgroups_per_threadgroup[3], dispatch_simdgroups_per_threadgroup[3];
  unsigned dispatch_threads_per_threadgroup[3], grid_origin[3], grid_size[3];
  unsigned quadgroup_index_in_threadgroup[3], quadgroups_per_threadgroup[3];
  unsigned simdgroup_index_in_threadgroup[3], simdgroups_per_threadgroup[3];
  unsigned thread_execution_width[3], threads_per_simdgroup[3];
  unsigned thread_index_in_quadgroup[3], thread_index_in_simdgroup[3], thread_index_in_threadgroup[3];
  unsigned thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
  unsigned threadgroups_per_grid[3], threads_per_grid[3], threads_per_threadgroup[3];
};

// What a lane sees at a meeting of its simdgroup: 64 bytes of each lane, and which of them take part.
struct gpu_lanes_view {
  const unsigned char* values;
  unsigned active, lane;
};
