/* SPDX-License-Identifier: GPL-2.0 */
/* What depends on the kernel's version, its options, and on being a module. */
#ifndef UPCALL_COMPAT_H
#define UPCALL_COMPAT_H

#include <linux/fs.h>
#include <linux/mount.h>
#include <linux/random.h>
#include <linux/suspend.h>
#include <linux/syscalls.h>
#include <linux/version.h>

/* sync(2) for modules comes with suspend; where that is not built in, the function of this name is empty. */
#ifdef MODULE
#define UPCALL_CAN_SYNC IS_ENABLED(CONFIG_PM_SLEEP)
#define upcall_sync ksys_sync_helper
#else
#define UPCALL_CAN_SYNC true
#define upcall_sync ksys_sync
#endif

static inline struct file *upcall_open_in(struct vfsmount *mnt, const char *name, int flags)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 14, 0)
	return file_open_root_mnt(mnt, name, flags, 0);
#else
	return file_open_root(mnt->mnt_root, mnt, name, flags, 0);
#endif
}

/*
 * "This machine is a copy": new keys for the generator, and for all who registered for it (WireGuard does). There since 5.18
 * with VMGENID, and exported only to VMGENID's module.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 18, 0) && \
	(defined(CONFIG_VMGENID_MODULE) || (defined(CONFIG_VMGENID) && !defined(MODULE)))
#define UPCALL_HAS_VMFORK 1
#endif

/* Exported to modules, and declared in a header of RCU's own. */
#ifdef CONFIG_TINY_RCU
static inline void rcu_expedite_gp(void) { }
static inline void rcu_unexpedite_gp(void) { }
#else
void rcu_expedite_gp(void);
void rcu_unexpedite_gp(void);
#endif

#endif
