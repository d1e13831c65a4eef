/* What InfiniStore's server wants of an RDMA device before it listens, for a host without one: a device that opens and registers
   memory, and does nothing else. For tests of its TCP protocol; nothing that went over RDMA was ever tested with this. */
#include <stdint.h>
#include <stdlib.h>

enum { LINK_LAYER_AT = 46, INFINIBAND = 1, LARGEST_STRUCT = 8192 };

static void *zeros(void) { return calloc(1, LARGEST_STRUCT); }

void **ibv_get_device_list(int *count) {
  static void *devices[2];
  if (!devices[0]) devices[0] = zeros();
  if (count) *count = 1;
  return devices;
}
void ibv_free_device_list(void **list) { (void)list; }
const char *ibv_get_device_name(void *device) { (void)device; return "none0"; }
void *ibv_open_device(void *device) { (void)device; return zeros(); }
int ibv_close_device(void *context) { free(context); return 0; }
int ibv_query_port(void *context, uint8_t port, uint8_t *attributes) {
  (void)context; (void)port;
  attributes[LINK_LAYER_AT] = INFINIBAND;
  return 0;
}
void *ibv_alloc_pd(void *context) { (void)context; return zeros(); }
int ibv_dealloc_pd(void *domain) { free(domain); return 0; }
void *ibv_reg_mr(void *domain, void *address, size_t length, int access) {
  (void)domain; (void)address; (void)length; (void)access;
  return zeros();
}
int ibv_dereg_mr(void *region) { free(region); return 0; }
