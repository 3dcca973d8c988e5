// SPDX-License-Identifier: GPL-2.0
/* CPUs online and offline, by APIC id: what the host knows them by. */
#include <linux/cpu.h>
#include <linux/cpumask.h>
#include <linux/errno.h>
#include <linux/smp.h>

#include "compat.h"
#include "upcall.h"

static bool has(const __le64 *set, u32 apic_id)
{
	return le64_to_cpu(set[apic_id / 64]) >> (apic_id % 64) & 1;
}

static void put(__le64 *set, u32 apic_id)
{
	set[apic_id / 64] |= cpu_to_le64(1ULL << (apic_id % 64));
}

/* The APIC id of a CPU that is there, which a possible CPU need not be; CTVM_UPCALL_CPUS for what no set can name. */
static u32 apic_id_of(unsigned int cpu)
{
	u32 apic_id = cpu_physical_id(cpu);

	return get_cpu_device(cpu) && apic_id < CTVM_UPCALL_CPUS ? apic_id : CTVM_UPCALL_CPUS;
}

static int find_cpu(u32 apic_id)
{
	unsigned int cpu;

	for_each_possible_cpu(cpu)
		if (apic_id_of(cpu) == apic_id)
			return cpu;
	return -EINVAL;
}

/* Either may be NULL. Bits are added to what is there. */
void upcall_fill_cpus(__le64 *possible, __le64 *online)
{
	unsigned int cpu;
	u32 apic_id;

	for_each_possible_cpu(cpu) {
		apic_id = apic_id_of(cpu);
		if (apic_id == CTVM_UPCALL_CPUS)
			continue;
		if (possible)
			put(possible, apic_id);
		if (online && cpu_online(cpu))
			put(online, apic_id);
	}
}

/* 0, also if user space was faster, or -errno. */
static int change(struct upcall_request *request, int cpu, bool online)
{
	if (cpu < 0)
		return cpu;
	/* Interrupts that cannot move, and the clock of old machines, are at home there. */
	if (cpu == 0)
		return -EBUSY;
	if (upcall_is_late(request))
		return -ETIME;
	return min(online ? add_cpu(cpu) : remove_cpu(cpu), 0);
}

static int note(struct ctvm_upcall_cpus_done *done, u32 apic_id, int err)
{
	struct ctvm_upcall_cpu_result *results = (void *)(done + 1);
	u32 count = le32_to_cpu(done->count);

	results[count].apic_id = cpu_to_le32(apic_id);
	results[count].status = cpu_to_le32(-err);
	done->count = cpu_to_le32(count + 1);
	return err;
}

/* Additions, lowest id first, then removals, highest first. One that fails does not keep the others; the first error is ours. */
int upcall_set_cpus(struct upcall_request *request)
{
	const struct ctvm_upcall_cpus *wanted = request->payload;
	struct ctvm_upcall_cpus_done *done = request->reply;
	int cpu, err, first = 0;
	u32 id;

	BUILD_BUG_ON(sizeof(*done) + CTVM_UPCALL_CPUS * sizeof(struct ctvm_upcall_cpu_result) > CTVM_UPCALL_MAX_LEN);

	/* A change waits for several grace periods of RCU, each of some ticks unless somebody is in a hurry. */
	rcu_expedite_gp();
	for (id = 0; id < CTVM_UPCALL_CPUS; id++) {
		cpu = find_cpu(id);
		if (!has(wanted->online, id) || (cpu >= 0 && cpu_online(cpu)))
			continue;
		err = note(done, id, change(request, cpu, true));
		first = first ?: err;
	}
	for (id = CTVM_UPCALL_CPUS; id-- > 0;) {
		cpu = find_cpu(id);
		if (has(wanted->online, id) || cpu < 0 || !cpu_online(cpu))
			continue;
		err = note(done, id, change(request, cpu, false));
		first = first ?: err;
	}
	rcu_unexpedite_gp();
	upcall_fill_cpus(NULL, done->online);
	request->reply_len = sizeof(*done) + le32_to_cpu(done->count) * sizeof(struct ctvm_upcall_cpu_result);
	return first;
}
