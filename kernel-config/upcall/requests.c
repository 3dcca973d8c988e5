// SPDX-License-Identifier: GPL-2.0
/* Which request is served by what. */
#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/string.h>
#include <linux/utsname.h>

#include "compat.h"
#include "upcall.h"

static void fill_view(struct upcall_request *request)
{
	struct ctvm_upcall_view *view = request->reply;

	upcall_fill_cpus(NULL, view->online);
	upcall_fill_memory(view);
	view->realtime_ns = cpu_to_le64(ktime_get_real_ns());
	view->frozen = cpu_to_le32(upcall_is_frozen());
	view->devices = cpu_to_le32(upcall_devices());
	request->reply_len = sizeof(*view);
}

static int query(struct upcall_request *request)
{
	fill_view(request);
	return 0;
}

static int set_memory(struct upcall_request *request)
{
	int err = upcall_set_memory(request);

	fill_view(request);
	return err;
}

struct operation {
	int (*serve)(struct upcall_request *request);
	u32 min_len;		/* of the payload */
	bool known;		/* this kernel can */
	bool changes;		/* the machine, so not while frozen */
};

static const struct operation operations[] = {
	[CTVM_UPCALL_QUERY] = { query, 0, true, false },
	[CTVM_UPCALL_SET_CPUS] = { upcall_set_cpus, sizeof(struct ctvm_upcall_cpus), IS_ENABLED(CONFIG_HOTPLUG_CPU), true },
	[CTVM_UPCALL_SET_MEMORY] = { set_memory, sizeof(struct ctvm_upcall_memory), IS_ENABLED(CONFIG_VIRTIO_MEM), true },
	[CTVM_UPCALL_ADD_DEVICE] = { upcall_add_device, sizeof(struct ctvm_upcall_device), IS_ENABLED(CONFIG_VIRTIO_MMIO), true },
	[CTVM_UPCALL_REMOVE_DEVICE] = { upcall_remove_device, sizeof(struct ctvm_upcall_device), IS_ENABLED(CONFIG_VIRTIO_MMIO), true },
	[CTVM_UPCALL_SET_TIME] = { upcall_set_time, sizeof(struct ctvm_upcall_time), true, false },
	[CTVM_UPCALL_RESEED] = { upcall_reseed, 16, true, false },
	[CTVM_UPCALL_FREEZE] = { upcall_freeze, 0, UPCALL_CAN_SYNC, false },
	[CTVM_UPCALL_THAW] = { upcall_thaw, 0, UPCALL_CAN_SYNC, false },
};

bool upcall_is_late(const struct upcall_request *request)
{
	return ktime_after(ktime_get(), request->deadline);
}

/* Serves it. Returns the reply's status. */
u32 upcall_answer(struct upcall_request *request)
{
	const struct operation *operation;

	request->reply_len = 0;
	if (request->type >= ARRAY_SIZE(operations) || !operations[request->type].known)
		return EOPNOTSUPP;
	operation = &operations[request->type];
	if (request->len < operation->min_len)
		return EINVAL;
	if (operation->changes && upcall_is_frozen())
		return EBUSY;
	memset(request->reply, 0, CTVM_UPCALL_MAX_LEN);
	return -operation->serve(request);
}

void upcall_fill_hello(struct ctvm_upcall_hello *hello)
{
	u64 type, ops = 0;

	for (type = 0; type < ARRAY_SIZE(operations); type++)
		if (operations[type].known)
			ops |= 1ULL << type;
	memset(hello, 0, sizeof(*hello));
	hello->ops = cpu_to_le64(ops);
	hello->memory_block = cpu_to_le64(upcall_memory_block());
	hello->page_size = cpu_to_le32(PAGE_SIZE);
	upcall_fill_cpus(hello->possible, hello->online);
	strscpy(hello->release, init_uts_ns.name.release, sizeof(hello->release));
}
