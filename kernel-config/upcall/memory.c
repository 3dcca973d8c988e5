// SPDX-License-Identifier: GPL-2.0
/* Memory is the virtio-mem driver's; this waits for it. */
#include <linux/compiler.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/printk.h>

#include "upcall.h"

u64 upcall_memory_block(void)
{
#ifdef CONFIG_MEMORY_HOTPLUG
	return memory_block_size_bytes();
#else
	return 0;
#endif
}

void upcall_fill_memory(struct ctvm_upcall_view *view)
{
	struct sysinfo info;

	si_meminfo(&info);
	view->total_bytes = cpu_to_le64((u64)info.totalram * info.mem_unit);
	view->free_bytes = cpu_to_le64((u64)max(si_mem_available(), 0L) << PAGE_SHIFT);
}

/*
 * virtio-mem does all its work in one item of this workqueue, which an interrupt of the device queues. Others' items that were
 * queued before now are waited for too. READ_ONCE: a flush that the compiler can see to be of a workqueue of the system gets
 * a warning that is meant for users of their own items.
 */
static void wait_for_virtio_mem(void)
{
	struct workqueue_struct *wq = READ_ONCE(system_freezable_wq);

	flush_workqueue(wq);
}

static UPCALL_JOB(memory_job, wait_for_virtio_mem);

int upcall_set_memory(struct upcall_request *request)
{
	const struct ctvm_upcall_memory *memory = request->payload;

	pr_debug("ctvm_upcall: %llu bytes asked for by the device at %#llx\n", le64_to_cpu(memory->requested_bytes),
		 le64_to_cpu(memory->base));
	return upcall_job_run(&memory_job, request);
}
