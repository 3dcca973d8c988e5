/* SPDX-License-Identifier: GPL-2.0 */
/* For other drivers: to be told when the host freezes the guest for a snapshot, and when it goes on. */
#ifndef CTVM_UPCALL_H
#define CTVM_UPCALL_H

#include <linux/notifier.h>

enum ctvm_upcall_event {
	/* Be quiet and consistent on return. An error refuses: who was told before is told CTVM_UPCALL_THAWED. */
	CTVM_UPCALL_FREEZING	= 1,
	/* The guest goes on, perhaps much later, on another host, and as one of several. */
	CTVM_UPCALL_THAWED	= 2,
};

/* Called from the driver's thread, which may sleep; no request is served meanwhile. */
int ctvm_upcall_register_notifier(struct notifier_block *nb);
int ctvm_upcall_unregister_notifier(struct notifier_block *nb);

#endif
